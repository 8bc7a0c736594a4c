"""Draw which tiles the forward kernel visits for a small layout: `python -m bench.pictures.mask`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

from gistkern import GistLayout

POSITIONS, BLOCK_COLS = 8, 16
FULL, MASKED, SEEN = "#9ecae1", "#fdae6b", "#555555"


def visited(dense: np.ndarray, compact: int, first: int) -> list[tuple[np.ndarray, bool]]:
    """(columns, whether a mask is needed) of each tile that the rows from `first` on visit."""
    rows = dense[first : first + POSITIONS]
    columns: list[int] = []
    for part in (np.flatnonzero(rows[:, :compact].any(0)), np.flatnonzero(rows[:, compact:].any(0)) + compact):
        columns += range(part[0], part[-1] + 1) if len(part) else []
    tiles = [np.array(columns[i : i + BLOCK_COLS]) for i in range(0, len(columns), BLOCK_COLS)]
    return [(tile, len(tile) < BLOCK_COLS or not rows[:, tile].all()) for tile in tiles]


def draw(path: Path) -> None:
    """Rows down, columns across: the compact rows, a gap, the local rows."""
    layout = GistLayout.from_segments([40, 40, 40], 6, tail=14)
    dense, compact = layout.dense()[0].numpy(), layout.num_compact
    gap = 4
    figure, axis = plt.subplots(figsize=(10, 6.6), layout="constrained")
    for first in range(0, layout.num_rows, POSITIONS):
        height = min(POSITIONS, layout.num_rows - first)
        for tile, needs_mask in visited(dense, compact, first):
            for columns, shift in ((tile[tile < compact], 0), (tile[tile >= compact], gap)):
                if len(columns):
                    box = (columns[0] + shift, first), columns[-1] - columns[0] + 1, height
                    axis.add_patch(Rectangle(*box, facecolor=MASKED if needs_mask else FULL, edgecolor="white", lw=1))
    rows, columns = np.nonzero(dense)
    axis.scatter(columns + 0.5 + gap * (columns >= compact), rows + 0.5, s=0.8, color=SEEN, marker="s", linewidths=0)
    axis.set(xlim=(-1, compact + gap + layout.num_local + 1), ylim=(layout.num_rows + 1, -1), aspect="equal")
    axis.set_xticks([compact / 2, compact + gap + layout.num_local / 2], ["compact rows", "local rows"])
    axis.set(ylabel="query position", title=f"row tiles of {POSITIONS} positions, column tiles of {BLOCK_COLS}")
    axis.legend(
        handles=[
            Patch(color=FULL, label="tile without a mask"),
            Patch(color=MASKED, label="boundary tile, masked row by row"),
            Patch(color=SEEN, label="visible pair"),
        ],
        loc="upper right",
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
