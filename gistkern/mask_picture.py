"""Pictures of a mask: as text for a terminal, as PNG for a page."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gistkern.layout import GistLayout

__all__ = ["save_png", "text"]

_ROWS = 120  # a wider picture tells nothing in a terminal


def text(layout: GistLayout, sample: int = 0) -> str:
    """One line per row, one character per token; ``g`` above marks the gist tokens."""
    if layout.num_local > _ROWS:
        raise ValueError(f"a text picture holds {_ROWS} tokens, the layout has {layout.num_local}: use save_png")
    mask = layout.token_mask()[sample].tolist()
    marks = " " * layout.tail + "".join("g" if gist else " " for gist in layout.is_gist[sample].tolist())
    return "\n".join([marks, *("".join("█" if seen else "·" for seen in row) for row in mask)])


def save_png(layout: GistLayout, path: str | os.PathLike, sample: int = 0, title: str | None = None) -> None:
    """Draw the token mask: local rows, rows seen through the gist buffer, and unseen ones. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    mask = layout.token_mask()[sample].int()
    local = layout.dense()[sample, :, layout.num_compact :].int()
    kinds = mask * 2 - local * mask  # 0 unseen, 1 local, 2 through the compact buffer
    colours = ["#f4f4f4", "#4878a8", "#e08214"]
    figure, axes = pyplot.subplots(figsize=(5, 5.4), layout="constrained")
    axes.imshow(kinds.cpu().numpy(), cmap=ListedColormap(colours), vmin=0, vmax=2, interpolation="nearest")
    axes.set(xlabel="token seen", ylabel="token that sees", title=title)
    names = ("unseen", "own segment", "gist or sink")
    handles = [Patch(facecolor=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
