"""Pictures drawn from layouts: masks, and the tiles that the forward kernel visits for a small one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from bench.pictures.style import beside, subplots
from gistkern import GistLayout
from gistkern.layout.picture import mask

MASKS = {
    "segments": (GistLayout.from_segments([12, 12, 12], 3, tail=6), "segments, each closed by three gists"),
    "one-segment": (GistLayout.from_segments([30], 4, tail=8), "one context, four gists, a question"),
    "sliding": (GistLayout.sliding(48, window=10, stride=7), "a sliding window, a gist every seven tokens"),
    "hierarchical": (
        GistLayout.hierarchical([9, 9, 9], 2, 4, tail=6),
        "gists of segments, then a summary of them",
    ),
}
POSITIONS, BLOCK_COLS = 8, 16
FULL, MASKED = "#9ecae1", "#fdc27a"


def visited(dense: np.ndarray, compact: int, first: int) -> list[tuple[np.ndarray, bool]]:
    """(columns, whether a mask is needed) of each tile that the rows from `first` on visit."""
    rows = dense[first : first + POSITIONS]
    columns: list[int] = []
    for part in (np.flatnonzero(rows[:, :compact].any(0)), np.flatnonzero(rows[:, compact:].any(0)) + compact):
        columns += range(part[0], part[-1] + 1) if len(part) else []
    tiles = [np.array(columns[i : i + BLOCK_COLS]) for i in range(0, len(columns), BLOCK_COLS)]
    return [(tile, len(tile) < BLOCK_COLS or not rows[:, tile].all()) for tile in tiles]


def tiles() -> Any:
    """Rows down, columns across: the compact rows, a gap, the local rows."""
    layout = GistLayout.from_segments([40, 40, 40], 6, tail=14)
    dense, compact = layout.dense()[0].numpy(), layout.num_compact
    gap = 6
    figure, axis = subplots((7.2, 6.2))
    for first in range(0, layout.num_rows, POSITIONS):
        height = min(POSITIONS, layout.num_rows - first)
        for tile, needs_mask in visited(dense, compact, first):
            for columns, shift in ((tile[tile < compact], 0), (tile[tile >= compact], gap)):
                if len(columns):
                    box = (columns[0] + shift, first), columns[-1] - columns[0] + 1, height
                    axis.add_patch(Rectangle(*box, facecolor=MASKED if needs_mask else FULL, edgecolor="white", lw=1))
    rows, columns = np.nonzero(dense)
    axis.scatter(
        columns + 0.5 + gap * (columns >= compact), rows + 0.5, s=0.8, color="#333333", marker="s", linewidths=0
    )
    axis.set(xlim=(-1, compact + gap + layout.num_local + 1), ylim=(layout.num_rows + 1, -1), aspect="equal")
    axis.set_xticks([compact / 2, compact + gap + layout.num_local / 2], ["compact rows", "local rows"])
    axis.set(ylabel="query position", title=f"row tiles of {POSITIONS} positions, column tiles of {BLOCK_COLS}")
    names = {
        "tile without a mask": "#4a90b8",
        "boundary tile, masked row by row": "#c77a10",
        "dots: visible pairs": "#333333",
    }
    for line, (name, color) in enumerate(names.items()):
        beside(axis, 92, 8 + 9 * line, name, color, (0, 0), weight="bold")
    return figure


PICTURES: dict[str, Callable[[], Any]] = {
    name: partial(mask, layout, title=title) for name, (layout, title) in MASKS.items()
}
PICTURES["tiles"] = tiles
