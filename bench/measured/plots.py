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

BARS = ("512/8", 4096)


def draw(report: Mapping[str, Any], folder: Path, stem: str) -> None:
    """Write the pictures of a report."""
    folder.mkdir(exist_ok=True)
    for section, plot in (("growth", _growth), ("attention", _bars)):
        if report.get(section):
            figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
            plot(axes, report[section])
            figure.savefig(folder / f"{stem}-{section}.png", dpi=110)
            pyplot.close(figure)


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
