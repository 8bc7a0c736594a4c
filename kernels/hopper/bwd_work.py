"""What each tile of Hopper's backward visits, worked out on the device once a call: all its partitions read it.

A program of those kernels is three partitions that walk the same tiles. Were each to search the rule's vectors, the
products would wait for it at every tile; here a program a tile does it beforehand. No host sync, no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from gistkern.kernels.primitives import count_at_most, row_intervals, visible_columns

__all__ = ["FIELDS", "WorkMeta", "sm90_gist_attn_bwd_work_kernel"]

# numbers of a tile in the table. Of a tile of rows: gist_lo, n_gist (whole copies), full_gist, local_lo, n_cols,
# full_local; of a tile of columns: row_begin, row_end, and of either half begin, end, full_begin, full_end
FIELDS = 16


class WorkMeta(NamedTuple):
    """The compile-time constants: POSITIONS of a tile of rows, the power of two at or above, `FIELDS`."""

    POSITIONS: int
    BLOCK: int
    FIELDS: int = FIELDS


@triton.jit
def rows_of_half(begin_ptr, end_ptr, first, n_rows, n_cols, n_past, GIST: tl.constexpr):
    """Rows that see some of the columns ``[first, first + 64)``, and those that see all: begin, end of either."""
    last = tl.minimum(first + 64, n_cols) - 1
    row_end = count_at_most(begin_ptr, n_rows, last)
    full_end = count_at_most(begin_ptr, n_rows, first)
    if GIST:
        row_begin = count_at_most(end_ptr, n_rows, first)
        full_begin = count_at_most(end_ptr, n_rows, last)
    else:
        row_begin = tl.maximum(first - n_past, 0)
        full_begin = tl.maximum(last - n_past, 0)
    if first >= n_cols:
        row_end = row_begin
    return row_begin, tl.maximum(row_end, row_begin), full_begin, full_end


@triton.jit
def write_columns(p_out, begin_ptr, end_ptr, i_tile, n_rows, n_cols, n_past, GIST: tl.constexpr):
    """The numbers of one tile of columns."""
    first = i_tile * 128
    begin0, end0, full_begin0, full_end0 = rows_of_half(begin_ptr, end_ptr, first, n_rows, n_cols, n_past, GIST)
    begin1, end1, full_begin1, full_end1 = rows_of_half(begin_ptr, end_ptr, first + 64, n_rows, n_cols, n_past, GIST)
    row_begin = tl.minimum(tl.where(begin0 < end0, begin0, begin1), tl.where(begin1 < end1, begin1, begin0))
    row_end = tl.maximum(tl.where(begin0 < end0, end0, row_begin), tl.where(begin1 < end1, end1, row_begin))
    tl.store(p_out, row_begin)
    tl.store(p_out + 1, row_end)
    tl.store(p_out + 2, begin0)
    tl.store(p_out + 3, end0)
    tl.store(p_out + 4, full_begin0)
    tl.store(p_out + 5, full_end0)
    tl.store(p_out + 6, begin1)
    tl.store(p_out + 7, end1)
    tl.store(p_out + 8, full_begin1)
    tl.store(p_out + 9, full_end1)


@triton.jit
def write_rows(p_out, rule, i_b, i_tile, n_rows, n_local_rows, META: tl.constexpr):
    """The numbers of one tile of rows; its gist columns are padded to whole copies of 16."""
    o_at = tl.arange(0, META.BLOCK)
    o_row = i_tile * META.POSITIONS + o_at
    m_row = (o_at < META.POSITIONS) & (o_row < n_rows)
    columns = visible_columns(row_intervals(rule, i_b, o_row, m_row, n_rows, n_local_rows), m_row)
    n_gist = tl.cdiv(columns.n_gist, 16) * 16
    tl.store(p_out, columns.gist_lo)
    tl.store(p_out + 1, n_gist)
    tl.store(p_out + 2, tl.minimum(columns.n_full, columns.n_gist))
    # beyond every row if no row sees local ones: copies then bring zeros
    tl.store(p_out + 3, columns.local_lo)
    tl.store(p_out + 4, n_gist + columns.n_local)
    tl.store(p_out + 5, n_gist + tl.maximum(columns.n_full - columns.n_gist, 0))


@triton.jit(do_not_specialize=["n_rows", "n_local_rows", "n_gist_rows", "n_row_tiles", "n_local_tiles", "n_gist_tiles"])
def sm90_gist_attn_bwd_work_kernel(
    table_ptr, rule, n_rows, n_local_rows, n_gist_rows, n_row_tiles, n_local_tiles, n_gist_tiles, META: tl.constexpr
):
    """The table, int32 ``[B, TILES, FIELDS]``: a sample's row tiles, then its tiles of local and of compact columns.

    rule: gist_begin, gist_end, local_begin, int32 ``[B, N]``. One program a tile.
    """
    n_tiles = n_row_tiles + n_local_tiles + n_gist_tiles
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_tile = tl.program_id(0) % n_tiles
    table_ptr = table_ptr.to(tl.pointer_type(tl.int32), bitcast=True)  # a part of a workspace
    p_out = table_ptr + tl.program_id(0).to(tl.int64) * META.FIELDS
    if i_tile < n_row_tiles:
        write_rows(p_out, rule, i_b, i_tile, n_rows, n_local_rows, META)
    elif i_tile < n_row_tiles + n_local_tiles:
        start_ptr = rule[2] + i_b * n_rows
        i_tile -= n_row_tiles
        write_columns(p_out, start_ptr, start_ptr, i_tile, n_rows, n_local_rows, n_local_rows - n_rows, False)
    else:
        i_tile -= n_row_tiles + n_local_tiles
        write_columns(p_out, rule[0] + i_b * n_rows, rule[1] + i_b * n_rows, i_tile, n_rows, n_gist_rows, 0, True)
