"""What each tile of Hopper's forward visits, worked out on the device once a call: all its partitions read it.

A program of that kernel is three partitions that walk the same tiles. Were each to reduce the rule's vectors, the
products would wait for it at every tile; here a program a tile does it beforehand. No host sync, no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from gistkern.kernels.primitives import FAR, row_intervals, visible_columns

__all__ = ["FIELDS", "WorkMeta", "sm90_gist_attn_fwd_work_kernel"]

# int32 numbers of a tile: gist_lo, n_gist (in whole copies of 16 rows, so that none holds rows of both buffers),
# local_lo, n_cols; then, for either half of its rows from 8 and from 16 on, two walks of visited columns (first tile of
# BN columns, end of the columns; 0, 0 for none), and the columns that need no mask, gist and local, begin and end each
FIELDS = 24


class WorkMeta(NamedTuple):
    """The compile-time constants: positions of half a tile, the power of two at or above a whole one's, and BN."""

    POSITIONS: int
    BLOCK: int
    BN: int


@triton.jit
def hull(b_begin, b_end, m_seen, m_any, shift):
    """Of intervals of rows, in visited columns: begin and end of their union's hull, and of what every row sees.

    Rows that see nothing do not count; where an interval is empty, begin and end are 0.
    """
    begin = tl.min(tl.where(m_seen, b_begin, FAR), 0)
    end = tl.max(tl.where(m_seen, b_end, 0), 0)
    is_empty = end <= begin
    full_begin = tl.max(tl.where(m_any, b_begin, 0), 0)
    full_end = tl.min(tl.where(m_any, b_end, FAR), 0)
    is_full = (~is_empty) & (full_begin < full_end)
    return (
        tl.where(is_empty, 0, begin + shift),
        tl.where(is_empty, 0, end + shift),
        tl.where(is_full, full_begin + shift, 0),
        tl.where(is_full, full_end + shift, 0),
    )


@triton.jit(do_not_specialize=["n_rows", "n_local_rows", "n_tiles"])
def sm90_gist_attn_fwd_work_kernel(work_ptr, rule, n_rows, n_local_rows, n_tiles, META: tl.constexpr):
    """work: int32 ``[B, n_tiles, FIELDS]``, as fp32; rule: gist_begin, gist_end, local_begin, int32 ``[B, N]``."""
    i_b = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_tile = tl.program_id(0) % n_tiles
    o_at = tl.arange(0, META.BLOCK)
    o_row = i_tile * (2 * META.POSITIONS) + o_at
    m_row = (o_at < 2 * META.POSITIONS) & (o_row < n_rows)
    b_sees = row_intervals(rule, i_b, o_row, m_row, n_rows, n_local_rows)
    columns = visible_columns(b_sees, m_row)
    n_gist = tl.cdiv(columns.n_gist, 16) * 16
    p_out = work_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + tl.program_id(0).to(tl.int64) * 24
    tl.store(p_out, columns.gist_lo)
    tl.store(p_out + 1, n_gist)
    # beyond every row if no row sees local ones: copies then bring zeros
    tl.store(p_out + 2, columns.local_lo)
    tl.store(p_out + 3, n_gist + columns.n_local)
    for half in tl.static_range(2):
        m_half = m_row & (o_at // META.POSITIONS == half)
        m_gist = m_half & (b_sees.gist < b_sees.gist_end)
        m_local = m_half & (b_sees.local <= b_sees.local_last)
        m_any = m_gist | m_local
        gist_begin, gist_end, full_gist, full_gist_end = hull(
            b_sees.gist, b_sees.gist_end, m_gist, m_any, -columns.gist_lo
        )
        local_begin, local_end, full_local, full_local_end = hull(
            b_sees.local, b_sees.local_last + 1, m_local, m_any, n_gist - columns.local_lo
        )
        begin = gist_begin // META.BN
        end = gist_end
        rest = local_begin // META.BN
        rest_end = local_end
        if gist_end == 0:
            begin = rest
        if (local_end > 0) & ((gist_end == 0) | (rest <= tl.cdiv(gist_end, META.BN))):
            # no tile lies between gist and local columns, or one holds both: one walk
            end = local_end
            rest = 0
            rest_end = 0
        p_half = p_out + 8 + half * 8
        tl.store(p_half, begin)
        tl.store(p_half + 1, end)
        tl.store(p_half + 2, rest)
        tl.store(p_half + 3, rest_end)
        tl.store(p_half + 4, full_gist)
        tl.store(p_half + 5, full_gist_end)
        tl.store(p_half + 6, full_local)
        tl.store(p_half + 7, full_local_end)
