"""What the pictures share beside `gistkern.layout.picture`: sizes, names beside their lines, and colors by meaning."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from gistkern.layout.picture import COLORS, STYLE

WIDE, HALF = (7.2, 4.2), (5.0, 3.6)  # inches: a page wide, and half of one, where letters must be larger
OURS, OTHER, GROUND = COLORS["orange"], COLORS["blue"], COLORS["faint"]
LANGUAGES = {"en": COLORS["blue"], "ko": COLORS["red"]}


def subplots(size: tuple[float, float] = WIDE, **how: Any) -> tuple[Any, Any]:
    """A figure of the shared style, and its axes."""
    plt.rcdefaults()
    plt.rcParams.update(STYLE)
    return plt.subplots(figsize=size, **how)


def beside(
    axis: Any, x: float, y: float, name: str, color: str, shift: tuple[float, float] = (7, 0), **how: Any
) -> None:
    """A line's name at its end, in its color: no legend to look up."""
    color = "#9c6500" if color == COLORS["orange"] else color  # readable on white
    axis.annotate(name, (x, y), shift, textcoords="offset points", color=color, va="center", **how)


def percent(axis: Any, low: float = 0.0) -> None:
    """A vertical axis of shares."""
    axis.set(ylim=(low - 0.03, 1.05), ylabel="exact answers")
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.grid(axis="y", color=GROUND)
    axis.set_axisbelow(True)


def thousands(axis: Any, ticks: Sequence[float]) -> None:
    """Whole numbers at the ticks of a logarithmic axis."""
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axis.minorticks_off()
