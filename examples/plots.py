"""Pictures of reports: exact match by depth, exact match against ratio, bytes of keys and values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from poc import NAME, ROWS, TARGET

__all__ = ["accuracy_against_ratio", "depth_map", "kv_bytes", "label"]

Rows = Sequence[Mapping[str, Any]]


def label(row: Mapping[str, Any]) -> str:
    """What a row's questions are, without their length: the differences from plain passkeys are spelled out."""
    parts = [row["language"]]
    if row.get("task", "passkey") != "passkey":
        parts.append(row["task"])
    elif row.get("keys", 1) > 1:
        parts.append(f"{row['keys']} keys")
    if row.get("filler", "templates") != "templates":
        parts.append(row["filler"])
    if row.get("wordings", "training") != "training":
        parts.append(f"{row['wordings'].replace('_', '-')} wordings")
    return ", ".join(parts)


def depth_map(reports: Mapping[str, Rows], path: Path) -> bool:
    """Exact match of passkeys by depth (across) and length (down); False, and no file, if no row knows depths."""
    lines = []
    for name, rows in reports.items():
        for row in sorted(rows, key=lambda row: (label(row), row["tokens"])):
            if "by_depth" in row:
                before = f"{name}: " if len(reports) > 1 else ""
                lines.append((f"{before}{label(row)} {row['tokens']:,} ({row['ratio']:.0f}x)", row["by_depth"]))
    if not lines:
        return False
    cells = [[math.nan if cell["exact"] is None else cell["exact"] for cell in depths] for _, depths in lines]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.45 * len(lines)), layout="constrained")
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(lines)), [title for title, _ in lines])
    axes.set_xticks(range(len(cells[0])), [f"{cell['depth']:.0%}" for cell in lines[0][1]])
    axes.set(xlabel="depth of the needle", ylabel="context tokens", title="exact match from the gist rows alone")
    figure.colorbar(image, label="exact match")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def accuracy_against_ratio(reports: Mapping[str, Rows], path: Path) -> None:
    """Exact match against compression ratio with 95 % intervals: a colour per kind of question, a marker per report."""
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(label(row) for rows in reports.values() for row in rows))
    for (name, rows), marker in zip(reports.items(), itertools.cycle("os^Dvp"), strict=False):
        for kind in dict.fromkeys(label(row) for row in rows):
            line = sorted((row for row in rows if label(row) == kind), key=lambda row: row["ratio"])
            exact = [row["exact"] for row in line]
            below = [row["exact"] - row["wilson_low"] for row in line]
            above = [row["wilson_high"] - row["exact"] for row in line]
            axes.errorbar(
                [row["ratio"] for row in line],
                exact,
                yerr=[[max(0.0, one) for one in below], [max(0.0, one) for one in above]],
                marker=marker,
                fillstyle="none",
                color=f"C{kinds.index(kind)}",
                capsize=3,
                label=f"{name}: {kind}",
            )
    axes.plot([row["ratio"] for row in ROWS], [row["exact"] for row in ROWS], "kx", label=NAME)
    axes.axhline(TARGET, color="grey", linestyle=":", label=f"its target, {TARGET:.0%}")
    axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="compression ratio (tokens / cached rows)", ylabel="exact match")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def kv_bytes(reports: Mapping[str, Rows], path: Path) -> None:
    """Bytes of keys and values of one context: every token's, and the gist rows'."""
    sizes = {
        f"{name}: {row['tokens']:,} tokens": (row["full_kv_bytes"], row["gist_kv_bytes"])
        for name, rows in reports.items()
        for row in sorted(rows, key=lambda row: row["tokens"])
    }
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.4 * len(sizes)), layout="constrained")
    for index, which in enumerate(("full cache", "gist rows")):
        places = [place + 0.4 * index for place in range(len(sizes))]
        axes.barh(places, [size[index] for size in sizes.values()], height=0.38, label=which)
    axes.set_yticks([place + 0.2 for place in range(len(sizes))], list(sizes))
    smallest = min(gist for _, gist in sizes.values())
    axes.set(xscale="log", xlim=(smallest / 10, None), xlabel="bytes of keys and values")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
