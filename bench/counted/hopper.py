"""How much of what Hopper's forward multiplies is visible, counted in pure Python by the rules of its work kernel.

    python -m bench.counted.hopper     # fills a table of docs/internals/hopper.md

tests/gpu/test_kernel_hopper_forward.py compares `walks` with what kernels/hopper/fwd_work.py writes. Nothing is a time.
"""

from typing import NamedTuple

import numpy as np

from bench.counted.work import FAR, Shape, forward_work, visible_pairs
from bench.fill import DOCS, fill
from bench.markdown import table
from bench.shapes import layout_of
from gistkern import GistLayout
from gistkern.kernels.chips import chip_named
from gistkern.kernels.configs import pick, pick_hopper
from gistkern.kernels.schedule import pack_lanes

# rows of one copy, lanes of one half of a tile, and columns that the last tile is cut to
BOX, HALF, CUT = 16, 64, 32


class Walks(NamedTuple):
    """Of each half tile of rows: two walks of columns, the first tile and the end of each (0, 0 for none)."""

    begin: np.ndarray
    end: np.ndarray
    rest: np.ndarray
    rest_end: np.ndarray


def walks(layout: GistLayout, positions: int, block_cols: int) -> Walks:
    """What halves of `positions` rows walk; both halves of a tile number the columns that either sees."""
    begin, end, local = (
        t[0].numpy().astype(np.int64) for t in (layout.gist_begin, layout.gist_end, layout.local_begin)
    )
    row = np.arange(layout.num_rows) + layout.tail
    sees_gist, sees_local = begin < end, local <= row

    def hull(sees: np.ndarray, first: np.ndarray, last: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        starts = np.arange(0, layout.num_rows, step)
        low = np.minimum.reduceat(np.where(sees, first, FAR), starts)
        return low, np.maximum.reduceat(np.where(sees, last, 0), starts)

    gist, gist_end = hull(sees_gist, begin, end, positions)
    start, start_end = hull(sees_local, local, row + 1, positions)
    gist_lo, gist_hi = hull(sees_gist, begin, end, 2 * positions)
    local_lo, _ = hull(sees_local, local, row + 1, 2 * positions)
    n_gist = -(-np.maximum(gist_hi - gist_lo, 0) // BOX) * BOX
    of_half = np.arange(len(gist)) // 2
    no_gist, no_local = gist_end <= gist, start_end <= start
    gist, gist_end = (np.where(no_gist, 0, value - gist_lo[of_half]) for value in (gist, gist_end))
    shift = (n_gist - local_lo)[of_half]
    start, start_end = (np.where(no_local, 0, value + shift) for value in (start, start_end))
    first, rest = gist // block_cols, start // block_cols
    one_walk = ~no_local & (no_gist | (rest <= -(-gist_end // block_cols)))
    return Walks(
        begin=np.where(no_gist, rest, first),
        end=np.where(one_walk, start_end, gist_end),
        rest=np.where(one_walk, 0, rest),
        rest_end=np.where(one_walk, 0, start_end),
    )


def visited_columns(begin: np.ndarray, end: np.ndarray, block_cols: int) -> np.ndarray:
    """Columns that a walk multiplies: whole tiles, and of the last one as many as are seen, in steps of `CUT`."""
    whole = np.maximum((end + CUT - 1) // block_cols, begin)
    rest = np.maximum(end - whole * block_cols, 0)
    return np.where(end > 0, (whole - begin) * block_cols + -(-rest // CUT) * CUT, 0)


def efficiency(layout: GistLayout, shape: Shape, block_cols: int) -> float:
    """Visible pairs over those of the tiles visited."""
    positions = HALF // pack_lanes(shape.heads // shape.kv_heads)
    found = walks(layout, positions, block_cols)
    columns = visited_columns(found.begin, found.end, block_cols)
    columns = columns + visited_columns(found.rest, found.rest_end, block_cols)
    return visible_pairs(layout) / (int(columns.sum()) * positions)


def counted(name: str, rows: int) -> list[str]:
    """A line of the table."""
    layout, shape, chip = layout_of(name, rows), Shape(), chip_named("sm_90")
    ours = efficiency(layout, shape, pick_hopper("fwd", shape.head_dim).block_cols)
    plain, config = forward_work(layout, shape, chip), pick("fwd", "sm_90", shape.head_dim, shape.itemsize)
    shares = visible_pairs(layout) * shape.heads / (plain.tiles * config.block_rows * config.block_cols)
    return [name, f"{rows:,}", *(f"{share:.2f}" for share in (ours, shares))]


NAMES = ("512/8", "256/16", "1024/128", "hierarchical", "one segment")
ROWS = (16384, 131072)


def tables() -> dict[str, str]:
    """The table of docs/internals/hopper.md."""
    head = ["segments", "rows", "Hopper's", "plain"]
    return {"visited": table(head, [counted(name, rows) for name in NAMES for rows in ROWS])}


if __name__ == "__main__":
    fill(DOCS / "internals" / "hopper.md", tables())
