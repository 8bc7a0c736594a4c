"""The picture of a mask, as PNG for a page; `GistLayout.picture` is the one for a terminal.

Also the look that all pictures share: colors that people see apart who see few, a white ground, no frame.
"""

from __future__ import annotations

import os
from textwrap import fill
from typing import Any

from gistkern.layout import GistLayout

__all__ = ["COLORS", "STYLE", "mask", "save", "save_png"]

# Okabe and Ito's; `faint` is the ground of what is not there
COLORS = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "red": "#d55e00",
    "purple": "#cc79a7",
    "gray": "#6b6b6b",
    "faint": "#eeeeee",
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["gray"],
    "axes.labelcolor": "#333333",
    "axes.grid": False,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "figure.facecolor": "white",  # also on a dark page
    "savefig.facecolor": "white",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}


def save(figure: Any, path: str | os.PathLike, dpi: int = 150) -> None:
    """Write a PNG that is the same, byte for byte, whenever it is drawn, and close the figure."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    pyplot.close(figure)


def mask(layout: GistLayout, sample: int = 0, title: str | None = None) -> Any:
    """The figure of `save_png`."""
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    seen = layout.token_mask()[sample].int()
    local = layout.dense()[sample, :, layout.num_compact :].int()
    kinds = seen * 2 - local * seen  # 0 unseen, 1 local, 2 through the compact buffer
    colors = [COLORS["faint"], COLORS["blue"], COLORS["orange"]]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5, 5.6))
        axes.imshow(kinds.cpu().numpy(), cmap=ListedColormap(colors), vmin=0, vmax=2, interpolation="nearest")
        axes.set(xlabel="token seen", ylabel="token that sees")
        axes.set_title(fill(title or "", 46), fontsize=11)
        names = ("unseen", "own segment", "gist or sink")
        handles = [Patch(facecolor=color, label=name) for color, name in zip(colors, names, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.0)
    return figure


def save_png(layout: GistLayout, path: str | os.PathLike, sample: int = 0, title: str | None = None) -> None:
    """Draw the token mask: local rows, rows seen through the gist buffer, and unseen ones. Needs matplotlib.

    Parameters
    ----------
    layout : GistLayout
        Of any size; `sample` is the batch row that is drawn.
    path : path-like
        Of the PNG.
    title : str, optional
        Above the picture.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    save(mask(layout, sample, title), path)
