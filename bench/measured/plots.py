"""Pictures of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.measured.baselines import BASELINES
from bench.measured.case import OURS

__all__ = ["draw"]

BARS = ("512/8", 4096)


def draw(report: Mapping[str, Any], folder: Path, stem: str) -> dict[str, str]:
    """Write the pictures of a report; their paths beside the page, by section."""
    folder.mkdir(exist_ok=True)
    drawn = {}
    for section, plot in (("growth", _growth), ("attention", _bars), ("models", _bytes)):
        if report.get(section):
            figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            plot(axes, report[section])
            name = f"{stem}-{section}.png"
            figure.savefig(folder / name, dpi=110)
            pyplot.close(figure)
            drawn[section] = f"{folder.name}/{name}"
    return drawn


def _growth(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Cost against rows, both logarithmic: a straight line of slope 1 is linear, of slope 2 quadratic."""
    for layout, name in dict.fromkeys((row["layout"], row["name"]) for row in rows):
        points = [
            (row["rows"], row["time"]["median"])
            for row in rows
            if (row["layout"], row["name"]) == (layout, name) and "time" in row
        ]
        if points:
            title = "gistkern" if name == OURS else BASELINES[name].title
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{title}, {layout}", lw=2.2 if name == OURS else 1)
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="time, of ours for 512/8 at the fewest rows")
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """How many times as long every baseline takes."""
    layout, size = BARS
    chosen = [row for row in rows if (row["layout"], row["rows"]) == (layout, size)] or rows[:2]
    names = [name for name in BASELINES if any(name in row["slower_than_ours"] for row in chosen)]
    for place, row in enumerate(chosen):
        found = [row["slower_than_ours"].get(name) for name in names]
        values = [one["median"] if one else 0 for one in found]
        error = [
            [value - one["min"] if one else 0 for value, one in zip(values, found, strict=True)],
            [one["max"] - value if one else 0 for value, one in zip(values, found, strict=True)],
        ]
        width = 0.8 / len(chosen)
        at = [index + place * width for index in range(len(names))]
        axes.barh(at, values, width, xerr=error, capsize=2, label=f"{row['heads']}, {row['pass']}")
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks([index + 0.4 for index in range(len(names))], [BASELINES[name].title for name in names])
    axes.set(xlabel=f"time / ours, {layout}, {size:,} rows")
    axes.invert_yaxis()
    axes.legend(fontsize="x-small")


def _bytes(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bytes of keys and values against the batch."""
    for model, context in dict.fromkeys((row["model"], row["context"]) for row in rows):
        chosen = [row for row in rows if (row["model"], row["context"]) == (model, context)]
        batches = [row["batch"] for row in chosen]
        (line,) = axes.plot(
            batches,
            [row["full bytes"] for row in chosen],
            marker="o",
            label=f"DynamicCache, {model}, {context:,} tokens",
        )
        gist = [row["gist bytes"] for row in chosen]
        axes.plot(batches, gist, marker="s", ls="--", color=line.get_color(), label=f"GistCache, {model}")
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="bytes of keys and values")
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)
