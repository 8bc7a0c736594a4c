"""Device functions that every attention kernel here is made of. Each rule stands once; docs/kernels.md explains.

Naming inside kernels: ``i_`` indices, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` tiles, ``n_`` counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "FAR",
    "LN2",
    "LOG2E",
    "backward_lse",
    "count_at_most",
    "load_columns",
    "load_rows",
    "matmul",
    "normalized",
    "pack_of",
    "probabilities",
    "query_rows",
    "row_bounds",
    "row_intervals",
    "scheduled",
    "seen_columns",
    "softmax_step",
    "store_rows",
    "visible_columns",
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
def query_rows(row_begin, row_end, i_head, PACK: tl.constexpr, BM: tl.constexpr):
    """The BM lanes of a tile: PACK query heads that share one K/V head, position-major, from ``row_begin`` on.

    i_head counts packs within a sample. Returns positions, query heads and the mask of real lanes.
    """
    o_m = tl.arange(0, BM)
    o_row = row_begin + o_m // PACK
    o_head = i_head * PACK + o_m % PACK
    return o_row, o_head, (o_m < (BM // PACK) * PACK) & (o_row < row_end)


@triton.jit
def pack_of(i_bh, HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr):
    """(sample, pack within it, K/V head) of a program that owns the pack `i_bh` of all samples."""
    i_b = (i_bh // (HEADS // PACK)).to(tl.int64)
    i_h = i_bh % (HEADS // PACK)
    return i_b, i_h, (i_h * PACK // GROUP).to(tl.int64)


@triton.jit
def row_intervals(gist_begin_ptr, gist_end_ptr, local_begin_ptr, o_rows, m_row):
    """The three vectors of the mask rule, ``[BM]`` each, at rows `o_rows` of the flat ``[B, N]``."""
    b_gist_begin = tl.load(gist_begin_ptr + o_rows, mask=m_row, other=0)
    b_gist_end = tl.load(gist_end_ptr + o_rows, mask=m_row, other=0)
    b_local_begin = tl.load(local_begin_ptr + o_rows, mask=m_row, other=0)
    return b_gist_begin, b_gist_end, b_local_begin


@triton.jit
def visible_columns(b_gist_begin, b_gist_end, b_local_begin, b_local_row, m_row):
    """The columns a tile of rows has to visit: its gist interval, then its local interval.

    Returns ``(gist_lo, n_gist, local_lo, n_local, n_full)``; every row sees the first `n_full` of the
    ``n_gist + n_local`` columns, so they need no mask. Rows that see nothing do not count (their results are
    overwritten).
    """
    m_gist = m_row & (b_gist_begin < b_gist_end)
    m_local = m_row & (b_local_begin <= b_local_row)
    m_any = m_gist | m_local
    gist_lo = tl.min(tl.where(m_gist, b_gist_begin, FAR), 0)
    n_gist = tl.maximum(tl.max(tl.where(m_gist, b_gist_end, 0), 0) - gist_lo, 0)
    local_lo = tl.min(tl.where(m_local, b_local_begin, FAR), 0)
    n_local = tl.maximum(tl.max(tl.where(m_local, b_local_row + 1, 0), 0) - local_lo, 0)
    last_begin = tl.max(tl.where(m_any, b_gist_begin, 0), 0)
    first_end = tl.min(tl.where(m_any, b_gist_end, FAR), 0)
    full_gist = tl.where(last_begin <= gist_lo, tl.maximum(tl.minimum(first_end - gist_lo, n_gist), 0), 0)
    last_local = tl.max(tl.where(m_any, b_local_begin, 0), 0)
    first_row = tl.min(tl.where(m_any, b_local_row, FAR), 0)
    full_local = tl.where(last_local <= local_lo, tl.maximum(tl.minimum(first_row + 1 - local_lo, n_local), 0), 0)
    n_full = tl.where(full_gist == n_gist, n_gist + full_local, full_gist)
    return gist_lo, n_gist, local_lo, n_local, n_full


@triton.jit
def load_columns(
    p_gist,
    gist_stride,
    p_local,
    local_stride,
    o_col,
    n_gist,
    n_cols,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    BLEND: tl.constexpr,
):
    """Tile ``[BN, BD]`` of visited columns: the gist buffer's rows, then the local buffer's; 0 beyond `n_cols`.

    The pointers are shifted so that column c is row c of either buffer. One tile may hold both, so a row tile
    pays for one partly filled tile, not two. WIDE: row offsets do not fit int32. BLEND: two masked loads, for
    AMD, where Triton 3.7 cannot compile a select between pointers.
    """
    o_row = o_col
    if WIDE:
        o_row = o_row.to(tl.int64)
    p_g = p_gist + o_row * gist_stride
    p_l = p_local + o_row * local_stride
    is_gist = o_col < n_gist
    m_col = o_col < n_cols
    if BLEND:
        b_gist = load_rows(p_g, m_col & is_gist, D, BD)
        b_local = load_rows(p_l, m_col & ~is_gist, D, BD)
        return tl.where(is_gist[:, None], b_gist, b_local)
    return load_rows(tl.where(is_gist, p_g, p_l), m_col, D, BD)


@triton.jit
def row_bounds(b_gist_begin, b_gist_end, b_local_begin, b_local_row, gist_lo, n_gist, local_lo):
    """The two intervals of each row in visited columns: ``[gist, gist_end)`` and ``[local, local_last]``."""
    shift = n_gist - local_lo
    return b_gist_begin - gist_lo, b_gist_end - gist_lo, b_local_begin + shift, b_local_row + shift


@triton.jit
def seen_columns(o_col, b_gist, b_gist_end, b_local, b_local_last):
    """bool ``[BM, BN]``: the mask rule (gistkern/layout/), row by row, on the columns of one tile.

    Bounds from `row_bounds`. Columns beyond the last are in no row's interval.
    """
    o_col = o_col[None, :]
    m_gist = (o_col >= b_gist[:, None]) & (o_col < b_gist_end[:, None])
    m_local = (o_col >= b_local[:, None]) & (o_col <= b_local_last[:, None])
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
