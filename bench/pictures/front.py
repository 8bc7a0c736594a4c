"""The README's pictures: answers at equal bytes, time and memory, and how a context is compressed and asked."""

from typing import Any

from matplotlib.patches import FancyBboxPatch, Rectangle

from bench.passkeys import PRETRAINED, report, same_questions
from bench.pictures.style import COLORS, HALF, OTHER, OURS, beside, percent, subplots

GPU = "nvidia-h100-80gb-hbm3"


def _kept() -> tuple[Any, Any, list[Any]]:
    """What answers the same questions: our gist rows, the full cache, and what kvpress leaves of that."""
    full, *evicted = report("smollm2-kvpress")["rows"]
    (ours,) = [row for row in report(PRETRAINED)["rows"] if same_questions(row, full)]
    return ours, full, evicted


def accuracy() -> Any:
    """Exact answers by the bytes that are kept."""
    ours, full, evicted = _kept()
    figure, axis = subplots(HALF)
    methods = sorted({row["method"] for row in evicted})
    for method in methods:
        x, y = zip(*((row["gist_kv_bytes"], row["exact"]) for row in evicted if row["method"] == method), strict=True)
        axis.plot(x, y, color=COLORS["gray"], marker="o", alpha=0.7, lw=1.2, clip_on=False)
    named = f"rows evicted by {len(methods)} methods\nof kvpress, no training"
    beside(axis, ours["gist_kv_bytes"], 0.26, named, COLORS["gray"], (0, 0))
    for row, color, name, shift in (
        (ours, OURS, f"{ours['gist_tokens']} gist rows,\ntrained on the task", (10, -16)),
        (full, OTHER, "full cache,\nno training", (-12, -24)),
    ):
        x, y = row["gist_kv_bytes"], row["exact"]
        error = [[y - row["wilson_low"]], [max(row["wilson_high"] - y, 0)]]
        axis.errorbar(x, y, error, color=color, marker="o", markersize=9, capsize=4, clip_on=False)
        beside(axis, x, y, name, color, shift, ha="right" if row is full else "left")
    axis.set(xscale="log", xlabel="keys and values kept", xlim=(3e5, 2e8))
    axis.set_xticks([1e6, 1e7, 1e8], ["1 MB", "10 MB", "100 MB"])
    axis.minorticks_off()
    axis.set_title(f"SmolLM2-135M, a context of {full['tokens']:,} tokens")
    percent(axis)
    return figure


def time_memory() -> Any:
    """On a GPU: attention's time by rows beside SDPA, and what reading a context takes of memory."""
    run = report(GPU)
    figure, (time, memory) = subplots(HALF, ncols=2, width_ratios=(1.8, 1))
    for name, said, color, place, shift in (
        ("sdpa dense", "dense mask", COLORS["red"], 4, (-8, 8)),
        ("causal", "causal", OTHER, 5, (8, 1)),
        ("ours", "ours", OURS, 5, (7, -8)),
    ):
        rows = [row for row in run["growth"] if (row["layout"], row["name"]) == ("512/8", name) and "time" in row]
        x, y = [row["rows"] for row in rows], [row["time"]["median"] for row in rows]
        time.plot(x, y, color=color)
        beside(time, x[place], y[place], said, color, shift, ha="right" if shift[0] < 0 else "left")
    time.set(xscale="log", yscale="log", xlabel="rows", ylabel="H100, ours at 1K rows = 1")
    time.set_title("time of attention,\nours and SDPA")
    time.set_xticks([2**10, 2**14, 2**17], ["1K", "16K", "128K"])
    time.set_yticks([1, 100, 10000], ["1", "100", "10,000"])
    time.minorticks_off()
    held = {row["name"]: row["peak bytes"] / 1e9 for row in run["memory"] if row["case"][0] == "compressing"}
    for place, (name, said, color) in enumerate((("plain prefill", "prefill", OTHER), ("ours", "ours", OURS))):
        memory.bar(place, held[name], color=color, width=0.7)
        beside(memory, place, held[name], f"{held[name]:.1f} GB", color, (0, 9), ha="center")
        beside(memory, place, 0, said, color, (0, -10), ha="center")
    memory.set(ylim=(0, 1.15 * max(held.values())), title="memory to read\n16K tokens, 8B")
    memory.axis("off")
    return figure


def _words(axis: Any, x: float, y: float, text: str, **how: Any) -> None:
    axis.text(x, y, text, va="center", **{"ha": "center", "color": "#333333", **how})


def _rows(axis: Any, first: int, last: int, color: str, name: str) -> None:
    """Cached rows, numbered from the top, and what they are."""
    for row in range(first, last):
        axis.add_patch(Rectangle((16, 84 - 4.2 * row), 44, 3, facecolor=color, lw=0))
    beside(axis, 62, 87.6 - 2.1 * (first + last), name, color, (2, 0))


def _box(axis: Any, x: float, y: float, width: float, height: float, text: str, color: str, **how: Any) -> None:
    box = {"facecolor": "white", "edgecolor": color, "lw": 1.5} | how
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=1.5", **box))
    _words(axis, x + width / 2, y + height / 2, text, color="white" if "facecolor" in how else color, weight="bold")


def compress() -> Any:
    """Four steps: read, cache, drop, ask."""
    ours, full, _ = _kept()
    gists, many, few = ours["gist_tokens"], 14, 3
    figure, axes = subplots((10.6, 3.9), ncols=4)
    read, cached, kept, asked = axes
    steps = {
        "Read": f"{full['tokens']:,} tokens of context,\nthen {gists} gist tokens",
        "Cache": f"a key/value row for each:\n{full['full_kv_bytes'] / 1e6:.0f} MB, were all kept",
        "Compress": f"{gists} gist rows stay:\n{ours['gist_kv_bytes'] / 1e6:.2f} MB, {ours['ratio']:.0f}x less",
        "Ask": "questions are answered\nfrom the gist rows alone",
    }
    for number, (axis, (step, said)) in enumerate(zip(axes, steps.items(), strict=True), 1):
        axis.set(xlim=(0, 100), ylim=(-6, 92))
        axis.axis("off")
        _words(axis, 4, 98, f"{number}  {step}", ha="left", weight="bold", size=14)
        _words(axis, 48, 0, said)
        if axis is not asked:
            _words(axis, 105, 57, "→", color=COLORS["gray"], size=22)
    _box(read, 5, 32, 82, 54, "", OTHER)
    text = (
        "It rained for most of",
        "the week, and the",
        "river rose.",
        "The pass key is 48213.",
        "On Friday the bridge",
        "was closed ...",
    )
    for line, words in enumerate(text):
        how = {"weight": "bold", "color": OTHER} if "key" in words else {}
        _words(read, 8, 82 - 9 * line, words, ha="left", size=9.5, **how)
    for gist in range(few):
        _box(read, 12 + 25 * gist, 15, 17, 7, "gist", OURS, facecolor=OURS)
    _rows(cached, 0, many, OTHER, "context")
    _rows(cached, many, many + few, OURS, "gists")
    _rows(kept, 0, many, "#dddddd", "")
    _rows(kept, many, many + few, OURS, "kept")
    for ends in ((30, 88), (88, 30)):
        kept.plot((12, 64), ends, color=COLORS["red"], lw=2.5)
    beside(kept, 66, 59, "dropped", COLORS["red"], (2, 0))
    _rows(asked, many, many + few, OURS, "gists")
    _box(asked, 2, 76, 90, 9, "What is the pass key?", OTHER)
    _box(asked, 24, 47, 46, 9, "48213", COLORS["green"])
    for start, end in ((73, 60), (31, 44)):
        style = {"arrowstyle": "-|>", "color": COLORS["gray"], "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
        asked.annotate("", (47, end), (47, start), arrowprops=style)
    return figure


PICTURES = {"accuracy": accuracy, "time-memory": time_memory, "compress": compress}
