"""How much of what Hopper's backward multiplies is visible, counted in pure Python by the rules of its work kernel.

    python -m bench.counted.hopper_backward     # fills a table of docs/internals/hopper-backward.md

tests/gpu/test_kernel_hopper_backward.py compares `columns_of_rows` and `rows_of_columns` with what
kernels/hopper/bwd_work.py writes. Nothing is a time.
"""

import numpy as np

from bench.counted.hopper import BOX, HALF, NAMES, ROWS
from bench.counted.work import FAR, Shape, backward_work, visible_pairs
from bench.fill import DOCS, fill
from bench.markdown import table
from bench.shapes import layout_of
from gistkern import GistLayout
from gistkern.kernels.chips import chip_named
from gistkern.kernels.configs import pick
from gistkern.kernels.schedule import pack_lanes


def columns_of_rows(layout: GistLayout, positions: int) -> np.ndarray:
    """Columns that dq visits for each tile of `positions` rows: gist rows in whole boxes, then local ones."""
    begin, end, local = _vectors(layout)
    row = np.arange(layout.num_rows) + layout.tail
    starts = np.arange(0, layout.num_rows, positions)

    def width(sees: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        low = np.minimum.reduceat(np.where(sees, first, FAR), starts)
        return np.maximum(np.maximum.reduceat(np.where(sees, last, 0), starts) - low, 0)

    return -(-width(begin < end, begin, end) // BOX) * BOX + width(local <= row, local, row + 1)


def rows_of_columns(layout: GistLayout, gist: bool) -> np.ndarray:
    """``[tiles, 2, 2]``: the rows that see some of each half tile's columns, from and to; alike where nobody does."""
    begin, end, local = _vectors(layout)
    columns = layout.num_compact if gist else layout.num_local
    first = np.arange(0, -(-columns // (2 * HALF)) * 2 * HALF, HALF)
    last = np.minimum(first + HALF, columns) - 1
    to = np.searchsorted(begin if gist else local, last, "right")
    start = np.searchsorted(end, first, "right") if gist else np.maximum(first - layout.tail, 0)
    to = np.where(first < columns, np.maximum(to, start), start)
    return np.stack([start, to], 1).reshape(-1, 2, 2)


def steps_of_columns(layout: GistLayout, gist: bool, positions: int) -> int:
    """Steps of `positions` rows that all halves together multiply; those of a tile begin at its first row."""
    halves = rows_of_columns(layout, gist)
    is_seen = halves[:, :, 0] < halves[:, :, 1]
    origin = np.where(is_seen, halves[:, :, 0], FAR).min(1)[:, None]
    steps = -(-(halves[:, :, 1] - origin) // positions) - (halves[:, :, 0] - origin) // positions
    return int(steps[is_seen].sum())


def efficiencies(layout: GistLayout, shape: Shape) -> tuple[float, float]:
    """Visible pairs over those visited, of dq, and of dk and dv."""
    positions, pairs = HALF // pack_lanes(shape.heads // shape.kv_heads), visible_pairs(layout)
    columns = -(-columns_of_rows(layout, 2 * positions) // HALF) * HALF
    steps = sum(steps_of_columns(layout, gist, positions) for gist in (False, True))
    return pairs / (int(columns.sum()) * 2 * positions), pairs / (steps * positions * HALF)


def _vectors(layout: GistLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    begin, end, local = (
        t[0].numpy().astype(np.int64) for t in (layout.gist_begin, layout.gist_end, layout.local_begin)
    )
    return begin, end, local


def counted(name: str, rows: int) -> list[str]:
    """A line of the table."""
    layout, shape, chip = layout_of(name, rows), Shape(), chip_named("sm_90")
    works, pairs = backward_work(layout, shape, chip), visible_pairs(layout) * shape.heads
    dq, dkv = (pick(kernel, "sm_90", shape.head_dim, shape.itemsize) for kernel in ("bwd_dq", "bwd_dkv"))
    plain = (
        pairs / (works["dq"].tiles * dq.block_rows * dq.block_cols),
        pairs / ((works["dkv local"].tiles + works["dkv gist"].tiles) * dkv.block_rows * dkv.block_cols),
    )
    return [name, f"{rows:,}", *(f"{share:.2f}" for share in (*efficiencies(layout, shape), *plain))]


def tables() -> dict[str, str]:
    """The table of docs/internals/hopper-backward.md."""
    head = ["segments", "rows", "dq", "dk and dv", "plain dq", "plain dk and dv"]
    return {"visited backward": table(head, [counted(name, rows) for name in NAMES for rows in ROWS])}


if __name__ == "__main__":
    fill(DOCS / "internals" / "hopper-backward.md", tables())
