"""The picture of a mask, as PNG for a page; `GistLayout.picture` is the one for a terminal."""

from __future__ import annotations

import os

from gistkern.layout import GistLayout

__all__ = ["save_png"]


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
    colors = ["#f4f4f4", "#4878a8", "#e08214"]
    figure, axes = pyplot.subplots(figsize=(5, 5.4), layout="constrained")
    axes.imshow(kinds.cpu().numpy(), cmap=ListedColormap(colors), vmin=0, vmax=2, interpolation="nearest")
    axes.set(xlabel="token seen", ylabel="token that sees", title=title)
    names = ("unseen", "own segment", "gist or sink")
    handles = [Patch(facecolor=color, label=name) for color, name in zip(colors, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
