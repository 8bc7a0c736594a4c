"""The picture of docs/benchmarks.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.measured.baselines import BASELINES
from bench.measured.case import OURS


def draw(report: Mapping[str, Any], folder: Path, stem: str) -> None:
    """Cost against rows, both logarithmic: a straight line of slope 1 is linear, of slope 2 quadratic."""
    folder.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    rows = report["growth"]
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
    figure.savefig(folder / f"{stem}-growth.png", dpi=110)
    pyplot.close(figure)
