"""Pictures of docs/results.md drawn from committed reports: answers by ratio, depth, length and keys; bytes."""

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from bench.passkeys import LANGUAGES as NAMES
from bench.passkeys import PRETRAINED, TINY, report
from bench.pictures.style import COLORS, LANGUAGES, OTHER, OURS, beside, percent, subplots, thousands

TRAINED = 400  # tokens of the longest context that compare.json's models were trained on


def _kind(row: Any) -> str:
    return "held-out wordings" if row["wordings"] == "held_out" else row["filler"]


def ratio() -> Any:
    """Exact answers of three seeds: by ratio, and at one ratio of real prose and of wordings that no training had."""
    runs = [report(name)["rows"] for name in TINY]
    shown = {"templates": "filler as in training", "prose": "real prose", "held-out wordings": "held-out wordings"}
    figure, axes = subplots((8.4, 4.0), ncols=3, width_ratios=(2.6, 1, 1), sharey=True)
    for axis, (kind, title) in zip(axes, shown.items(), strict=True):
        for place, (language, color) in enumerate(LANGUAGES.items()):
            rows = [[row for row in run if (row["language"], _kind(row)) == (language, kind)] for run in runs]
            exact = np.array([[row["exact"] for row in run] for run in rows])  # [seeds, ratios]
            by_ratio = kind == "templates"
            x = np.array([row["ratio"] for row in rows[0]]) * (0.96, 1.04)[place] if by_ratio else np.array([place])
            axis.fill_between(x, exact.min(0), exact.max(0), color=color, alpha=0.2, lw=0)
            axis.plot(x, exact.mean(0), color=color, marker="_" * (not by_ratio), markersize=24)
            axis.plot(x, exact.T, color=color, marker="os"[place], ls="", alpha=0.75, clip_on=False)
            if by_ratio:
                name = f"{NAMES[language]} ({('circles', 'squares')[place]})"
                beside(axis, 48, 0.6 - 0.09 * place, name, color, (0, 0))
        axis.set_title(title)
        percent(axis)
        axis.label_outer()
    axes[0].set(xscale="log", xlabel="tokens per cached row")
    thousands(axes[0], [50, 299, 610, 1210])
    beside(axes[0], 48, 0.39, "a mark per seed, lines at their mean", COLORS["gray"], (0, 0))
    for axis in axes[1:]:
        axis.set(xlim=(-0.7, 1.7), xlabel="299 tokens per row")
        axis.set_xticks([0, 1], list(NAMES.values()))
    return figure


def depth() -> Any:
    """Exact answers of all seeds together, by where in the context the key stood."""
    runs = [report(name)["rows"] for name in TINY]
    cells = [[row["by_depth"] for row in rows] for rows in zip(*runs, strict=True)]
    count = np.array([[[one["n"] for one in seed] for seed in row] for row in cells])
    right = np.array([[[one["exact"] * one["n"] for one in seed] for seed in row] for row in cells])
    share = right.sum(1) / count.sum(1)  # [rows, depths]
    figure, axis = subplots((8.4, 4.6))
    colors = LinearSegmentedColormap.from_list("", [COLORS["red"], "#fbe0c0", "#d9eaf5"])
    axis.imshow(share, cmap=colors, vmin=0, vmax=1, aspect="auto")
    for (y, x), one in np.ndenumerate(share):
        axis.text(x, y, f"{100 * one:.0f}", ha="center", va="center", size=9)
    names = [f"{NAMES[row['language']]}, {_kind(row)}".removesuffix(", templates") for row in runs[0]]
    tokens = [f"{row['tokens']:,}" for row in runs[0]]
    axis.set_yticks(range(len(names)), [f"{name}, {n}" for name, n in zip(names, tokens, strict=True)], size=9)
    axis.set_xticks(range(10), [f"{10 * place}-{10 * place + 10} %" for place in range(10)], size=9)
    axis.set(xlabel="where the key stood, from the context's beginning", title="percent of exact answers, three seeds")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return figure


def kv_bytes() -> Any:
    """What a context's keys and values take, all of them and the gist rows'."""
    figure, axis = subplots()
    for name, run, style in (("SmolLM2-135M", PRETRAINED, "-"), ("tiny model", TINY[0], "--")):
        rows = [row for row in report(run)["rows"] if (row["language"], row["wordings"]) == ("en", "training")]
        held = {row["tokens"]: (row["full_kv_bytes"], row["gist_kv_bytes"]) for row in rows}
        for place, (what, color) in enumerate((("full cache", OTHER), ("10 gist rows", OURS))):
            axis.plot(list(held), [both[place] for both in held.values()], style, color=color, marker="o")
            last = max(held)
            beside(axis, last, held[last][place], f"{name},\n{what}", color)
    axis.set(xscale="log", yscale="log", xlabel="tokens of context", xlim=(450, 32_000))
    axis.set_yticks([1e4, 1e5, 1e6, 1e7, 1e8], ["10 kB", "100 kB", "1 MB", "10 MB", "100 MB"])
    axis.set_title("keys and values of one context")
    thousands(axis, [500, 1000, 3000, 12000])
    return figure


def layouts() -> Any:
    """Exact answers by length, of the three ways to lay out a context with ten gists."""
    found = {one["name"]: one for one in report("compare")["results"]}
    figure, axis = subplots()
    styles = {"hierarchical": OURS, "segment-wise": COLORS["green"], "single": OTHER}
    for shift, (name, color) in zip((0.98, 1, 1.02), styles.items(), strict=True):
        rows = found[f"{name}-10"]["rows"]
        x = np.array([row["tokens"] for row in rows]) * shift
        low, exact, high = (np.array([row[key] for row in rows]) for key in ("wilson_low", "exact", "wilson_high"))
        axis.errorbar(
            x, exact, (exact - low, (high - exact).clip(0)), color=color, marker="o", capsize=3, clip_on=False
        )
        kept = f"{rows[-1]['gist_tokens']:,} rows cached at {rows[-1]['tokens']:,}"
        beside(axis, x[-1], exact[-1], f"{name}\n{kept}", color, (10, 0))
    axis.axvline(TRAINED, color=COLORS["gray"], ls=":", lw=1.5)
    beside(axis, TRAINED, 0.1, "longest context\nof training", COLORS["gray"], (-6, 0), ha="right")
    axis.set(xscale="log", xlabel="tokens of context", xlim=(90, 4500))
    thousands(axis, [100, 200, 400, 800, 1600])
    percent(axis)
    return figure


def capacity() -> Any:
    """Digits recovered per cached row, by how many keys a context held."""
    figure, axis = subplots()
    colors = list(COLORS.values())
    for color, result in zip(colors, (one for one in report("compare")["results"] if "capacity" in one), strict=False):
        rows = result["capacity"]
        keys, digits, low, high = ([row[key] for row in rows] for key in ("keys", "digits_per_row", "low", "high"))
        axis.plot(keys, digits, color=color, marker="o")
        axis.fill_between(keys, low, high, color=color, alpha=0.15, lw=0)
        count = rows[0]["gist_rows"]
        beside(axis, keys[-1], digits[-1], f"{count:.0f} row{'s' * (count > 1)}", color)
    axis.set(yscale="log", xlabel="keys in a context", ylabel="digits recovered per cached row", xlim=(0.8, 9))
    axis.set_xticks(keys)
    axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axis.minorticks_off()
    return figure


PICTURES = {"ratio": ratio, "depth": depth, "bytes": kv_bytes, "compare-layouts": layouts, "compare-capacity": capacity}
