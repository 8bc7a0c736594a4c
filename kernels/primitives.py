"""Device functions that every attention kernel here is made of. Each rule stands once; kernels.md explains.

Naming inside kernels: ``i_`` indices, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` tiles, ``n_`` counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "FAR",
    "LN2",
    "LOG2E",
    "Intervals",
    "Visible",
    "backward_lse",
    "column_intervals",
    "count_at_most",
    "head_rows",
    "load_columns",
    "load_rows",
    "matmul",
    "normalized",
    "pack_of",
    "probabilities",
    "query_rows",
    "row_intervals",
    "sample_of",
    "scheduled",
    "seen_columns",
    "sees_nothing",
    "softmax_step",
    "store_rows",
    "visible_columns",
    "visited",
]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# beyond every row index; sums of two of them still fit int32
FAR = tl.constexpr(1 << 30)
# width of one step of `count_at_most`
PROBES = tl.constexpr(128)
# the interpreter multiplies the bit patterns of bfloat16 operands, so there (only) operands are widened first
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def matmul(b_a, b_b, PRECISION: tl.constexpr):
    """fp32 product of two tiles; PRECISION is ``"ieee"`` or ``"tf32"`` and matters for fp32 inputs only."""
    if INTERPRETED:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, input_precision=PRECISION)


@triton.jit
def load_rows(p_rows, m_rows, D: tl.constexpr, BD: tl.constexpr):
    """Tile ``[R, BD]`` of the rows at ``p_rows`` ``[R]``; 0 where masked and in the padding of D."""
    o_d = tl.arange(0, BD)
    m_tile = m_rows[:, None]
    if BD != D:
        m_tile = m_tile & (o_d < D)[None, :]
    return tl.load(p_rows[:, None] + o_d[None, :], mask=m_tile, other=0.0)


@triton.jit
def store_rows(p_rows, b_tile, m_rows, D: tl.constexpr, BD: tl.constexpr):
    """The inverse of `load_rows`: columns ``0..D`` of a tile ``[R, BD]``."""
    o_d = tl.arange(0, BD)
    m_tile = m_rows[:, None]
    if BD != D:
        m_tile = m_tile & (o_d < D)[None, :]
    tl.store(p_rows[:, None] + o_d[None, :], b_tile, mask=m_tile)


@triton.jit
def scheduled(i_program, n_tiles, n_heads, section, LAST_FIRST: tl.constexpr):
    """(tile, head) of a program: sections of heads that fit in L2, tiles in order within, heads fastest.

    LAST_FIRST walks the tiles backwards: later query rows see more gists, so the longest programs start first.
    """
    i_section = i_program // (section * n_tiles)
    i_rest = i_program % (section * n_tiles)
    width = tl.minimum(section, n_heads - i_section * section)
    i_tile = i_rest // width
    if LAST_FIRST:
        i_tile = n_tiles - 1 - i_tile
    return i_tile, i_section * section + i_rest % width


@triton.jit
def head_rows(rows, i_b, i_head, o_row):
    """Pointers to rows `o_row` of a head of the buffer `rows`, a pointer and the strides of batch, head and row."""
    return rows[0] + i_b * rows[1][0] + i_head * rows[1][1] + o_row * rows[1][2]


@triton.jit
def sample_of(rows, i_b):
    """A buffer as `head_rows` takes it, that begins with sample `i_b` of `rows`."""
    return rows[0] + i_b * rows[1][0], rows[1]


@triton.jit
def query_rows(row_begin, row_end, i_head, META: tl.constexpr):
    """The BM lanes of a tile: PACK query heads that share one K/V head, position-major, from ``row_begin`` on.

    i_head counts packs within a sample. Returns positions, query heads and the mask of real lanes.
    """
    o_m = tl.arange(0, META.BM)
    o_row = row_begin + o_m // META.PACK
    o_head = i_head * META.PACK + o_m % META.PACK
    return o_row, o_head, (o_m < (META.BM // META.PACK) * META.PACK) & (o_row < row_end)


@triton.jit
def pack_of(i_bh, META: tl.constexpr):
    """(sample, pack within it, K/V head) of a program that owns the pack `i_bh` of all samples."""
    i_b = (i_bh // (META.HEADS // META.PACK)).to(tl.int64)
    i_h = i_bh % (META.HEADS // META.PACK)
    return i_b, i_h, (i_h * META.PACK // META.GROUP).to(tl.int64)


class Intervals(NamedTuple):
    """Tiles ``[BM]``: each row sees gist rows ``[gist, gist_end)`` and local rows ``[local, local_last]``."""

    gist: Any
    gist_end: Any
    local: Any
    local_last: Any


class Visible(NamedTuple):
    """What a tile of rows visits: `n_gist` gist rows from `gist_lo` on, then `n_local` local rows from `local_lo` on.

    Every row sees the first `n_full` of these columns, so they need no mask.
    """

    gist_lo: Any
    n_gist: Any
    local_lo: Any
    n_local: Any
    n_full: Any


@triton.jit
def row_intervals(rule, i_b, o_row, m_row, n_rows, n_local_rows):
    """`Intervals` of rows `o_row` of a sample, from the three vectors ``[B, N]`` of the mask rule."""
    o_rule = i_b * n_rows + o_row
    return Intervals(
        gist=tl.load(rule[0] + o_rule, mask=m_row, other=0),
        gist_end=tl.load(rule[1] + o_rule, mask=m_row, other=0),
        local=tl.load(rule[2] + o_rule, mask=m_row, other=0),
        local_last=o_row + (n_local_rows - n_rows),
    )


@triton.jit
def sees_nothing(b_sees):
    """Of which rows both `Intervals` are empty, ``[BM]``."""
    return (b_sees.gist >= b_sees.gist_end) & (b_sees.local > b_sees.local_last)


@triton.jit
def visible_columns(b_sees, m_row):
    """`Visible` of a tile of rows. Rows that see nothing do not count (their results are overwritten)."""
    m_gist = m_row & (b_sees.gist < b_sees.gist_end)
    m_local = m_row & (b_sees.local <= b_sees.local_last)
    m_any = m_gist | m_local
    gist_lo = tl.min(tl.where(m_gist, b_sees.gist, FAR), 0)
    n_gist = tl.maximum(tl.max(tl.where(m_gist, b_sees.gist_end, 0), 0) - gist_lo, 0)
    local_lo = tl.min(tl.where(m_local, b_sees.local, FAR), 0)
    n_local = tl.maximum(tl.max(tl.where(m_local, b_sees.local_last + 1, 0), 0) - local_lo, 0)
    last_begin = tl.max(tl.where(m_any, b_sees.gist, 0), 0)
    first_end = tl.min(tl.where(m_any, b_sees.gist_end, FAR), 0)
    full_gist = tl.where(last_begin <= gist_lo, tl.maximum(tl.minimum(first_end - gist_lo, n_gist), 0), 0)
    last_local = tl.max(tl.where(m_any, b_sees.local, 0), 0)
    first_row = tl.min(tl.where(m_any, b_sees.local_last, FAR), 0)
    full_local = tl.where(last_local <= local_lo, tl.maximum(tl.minimum(first_row + 1 - local_lo, n_local), 0), 0)
    n_full = tl.where(full_gist == n_gist, n_gist + full_local, full_gist)
    return Visible(gist_lo=gist_lo, n_gist=n_gist, local_lo=local_lo, n_local=n_local, n_full=n_full)


@triton.jit
def visited(gist, local, i_b, i_kv, columns):
    """A head's gist and local rows as `load_columns` takes them: pointers such that column c is row c of either."""
    p_gist = head_rows(gist, i_b, i_kv, columns.gist_lo.to(tl.int64))
    p_local = head_rows(local, i_b, i_kv, (columns.local_lo - columns.n_gist).to(tl.int64))
    return p_gist, gist[1][2], p_local, local[1][2]


@triton.jit
def load_columns(rows, o_col, n_gist, n_cols, META: tl.constexpr):
    """Tile ``[BN, BD]`` of visited columns: the gist buffer's rows, then the local buffer's; 0 beyond `n_cols`.

    rows: as `visited` returns them. One tile may hold both, so a row tile pays for one partly filled tile, not two.
    WIDE: row offsets do not fit int32. BLEND: two masked loads, for AMD, where Triton 3.7 cannot compile a select
    between pointers.
    """
    o_row = o_col
    if META.WIDE:
        o_row = o_row.to(tl.int64)
    p_g = rows[0] + o_row * rows[1]
    p_l = rows[2] + o_row * rows[3]
    is_gist = o_col < n_gist
    m_col = o_col < n_cols
    if META.BLEND:
        b_gist = load_rows(p_g, m_col & is_gist, META.D, META.BD)
        b_local = load_rows(p_l, m_col & ~is_gist, META.D, META.BD)
        return tl.where(is_gist[:, None], b_gist, b_local)
    return load_rows(tl.where(is_gist, p_g, p_l), m_col, META.D, META.BD)


@triton.jit
def column_intervals(b_sees, columns):
    """The `Intervals` of rows in visited columns."""
    shift = columns.n_gist - columns.local_lo
    return Intervals(
        gist=b_sees.gist - columns.gist_lo,
        gist_end=b_sees.gist_end - columns.gist_lo,
        local=b_sees.local + shift,
        local_last=b_sees.local_last + shift,
    )


@triton.jit
def seen_columns(o_col, b_sees):
    """bool ``[BM, BN]``: the mask rule (gistkern/layout/), row by row, on the columns of one tile.

    b_sees: from `column_intervals`. Columns beyond the last are in no row's interval.
    """
    o_col = o_col[None, :]
    m_gist = (o_col >= b_sees.gist[:, None]) & (o_col < b_sees.gist_end[:, None])
    m_local = (o_col >= b_sees.local[:, None]) & (o_col <= b_sees.local_last[:, None])
    return m_gist | m_local


@triton.jit
def softmax_step(b_s, b_m, b_l, scale, FP32: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").

    b_s ``[BM, BN]`` raw scores, -inf where unseen; b_m, b_l ``[BM]`` running maximum of the raw scores and sum;
    scale > 0. Returns probabilities, the factor for what was accumulated, and the new maximum and sum.
    """
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    # a row that has seen nothing yet has -inf here, and -inf - -inf would be NaN
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    qk_scale = scale * LOG2E
    if FP32:
        # the difference first: rounding the two products by themselves would cost units in the last place
        b_alpha = tl.exp2((b_m - b_safe) * qk_scale)
        b_p = tl.exp2((b_s - b_safe[:, None]) * qk_scale)
    else:
        b_alpha = tl.exp2(b_m * qk_scale - b_safe * qk_scale)
        b_p = tl.exp2(b_s * qk_scale - (b_safe * qk_scale)[:, None])
    return b_p, b_alpha, b_new, b_l * b_alpha + tl.sum(b_p, 1)


@triton.jit
def normalized(b_acc, b_m, b_l, scale, m_empty):
    """Output tile and natural-log LSE from what the softmax steps accumulated; 0 and -inf for empty rows.

    Tiles without a mask give rows that see nothing garbage, so `m_empty` must name them.
    """
    m_empty = m_empty | (b_l == 0.0)
    b_out = tl.where(m_empty[:, None], 0.0, b_acc / tl.where(m_empty, 1.0, b_l)[:, None])
    b_lse = tl.where(m_empty, float("-inf"), b_m * scale + tl.log2(tl.where(m_empty, 1.0, b_l)) * LN2)
    return b_out, b_lse


@triton.jit
def backward_lse(b_lse, FP32: tl.constexpr):
    """The LSE as `probabilities` wants it: +inf where there is none, in units of log2 unless FP32."""
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    if FP32:
        return b_lse
    return b_lse * LOG2E


@triton.jit
def probabilities(b_s, b_lse, scale, FP32: tl.constexpr):
    """exp(scale * scores - LSE), for the backward: b_s raw scores, b_lse from `backward_lse`, broadcastable.

    A row that sees nothing, or that does not exist, has LSE +inf and gets exactly 0 everywhere.
    """
    if FP32:
        # the difference first: rounding LSE * log2(e) by itself would cost fp32 a few units in the last place
        return tl.exp2((b_s * scale - b_lse) * LOG2E)
    return tl.exp2(b_s * (scale * LOG2E) - b_lse)


@triton.jit
def count_at_most(p_values, n_values, bound):
    """How many of the non-decreasing int32 values are <= bound: a search of PROBES ways per step."""
    o_probe = tl.arange(0, PROBES)
    lo = 0
    hi = n_values
    while lo < hi:
        step = tl.cdiv(hi - lo, PROBES)
        o_last = lo + (o_probe + 1) * step - 1
        # the answer never exceeds hi, so probes from hi on count as larger
        b_value = tl.load(p_values + o_last, mask=o_last < hi, other=FAR)
        below = tl.sum((b_value <= bound).to(tl.int32), 0)
        lo = lo + below * step
        hi = tl.minimum(hi, lo + step - 1)
    return lo
