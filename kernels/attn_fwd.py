"""Forward of gist-masked attention: one walk over the gist columns, then the local columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.arguments import AttentionArguments, row_tiles, strided
from gistkern.kernels.launch import Launch
from gistkern.kernels.primitives import (
    column_intervals,
    head_rows,
    load_columns,
    load_rows,
    matmul,
    normalized,
    pack_of,
    query_rows,
    row_intervals,
    scheduled,
    seen_columns,
    sees_nothing,
    softmax_step,
    store_rows,
    visible_columns,
    visited,
)

__all__ = ["attend", "gist_attn_fwd_kernel", "launch_gist_attn_fwd", "plan_gist_attn_fwd"]


@triton.jit
def attend_range(
    b_q, state, keys, values, b_sees, columns, col_begin, col_end, scale, META: tl.constexpr, MASK: tl.constexpr
):
    """The online softmax over the visited columns ``[col_begin, col_end)``; `state` in, `state` out.

    MASK: ``"none"``, ``"all"``, or ``"boundary"`` for the tiles that reach beyond the first `n_full` columns.
    """
    PRECISION: tl.constexpr = META.PRECISION  # Triton 3.6 passes no string on that is an attribute
    b_acc, b_m, b_l = state
    for i_col in tl.range(col_begin, col_end, META.BN):
        o_col = i_col + tl.arange(0, META.BN)
        b_k = load_columns(keys, o_col, columns.n_gist, col_end, META)
        b_s = matmul(b_q, tl.trans(b_k), PRECISION)  # [BM, BN]
        if MASK == "all":
            b_s = tl.where(seen_columns(o_col, b_sees), b_s, float("-inf"))
        if MASK == "boundary":  # noqa: SIM102 - decided by the compiler, the next by the program
            if i_col + META.BN > columns.n_full:
                b_s = tl.where(seen_columns(o_col, b_sees), b_s, float("-inf"))
        b_p, b_alpha, b_m, b_l = softmax_step(b_s, b_m, b_l, scale, b_q.dtype == tl.float32)
        b_v = load_columns(values, o_col, columns.n_gist, col_end, META)
        b_acc = b_acc * b_alpha[:, None] + matmul(b_p.to(b_v.dtype), b_v, PRECISION)
    return b_acc, b_m, b_l


@triton.jit
def attend(b_q, keys, values, b_sees, columns, col_begin, col_end, scale, META: tl.constexpr):
    """Attention of a tile of rows ``b_q`` ``[BM, BD]`` over its visited columns ``[col_begin, col_end)``.

    The range starts at a multiple of BN, and ends at one or at the last column. keys, values: from `visited`; b_sees:
    the rows' `Intervals` as they were read. TWO_LOOPS: tiles without a mask have a loop of their own.
    Returns the unnormalized output ``[BM, BD]``, the running maximum (of raw scores) and sum ``[BM]``.
    """
    b_acc = tl.full([META.BM, META.BD], 0.0, tl.float32)
    b_m = tl.full([META.BM], float("-inf"), tl.float32)
    b_l = tl.full([META.BM], 0.0, tl.float32)
    state = b_acc, b_m, b_l
    b_sees = column_intervals(b_sees, columns)
    full_end = col_begin
    if META.TWO_LOOPS:
        full_end = tl.minimum(tl.maximum(columns.n_full // META.BN * META.BN, col_begin), col_end)
        state = attend_range(b_q, state, keys, values, b_sees, columns, col_begin, full_end, scale, META, "none")
    rest: tl.constexpr = "all" if META.TWO_LOOPS else "boundary"
    return attend_range(b_q, state, keys, values, b_sees, columns, full_end, col_end, scale, META, rest)


@triton.jit(do_not_specialize=["n_rows", "n_local_rows", "n_heads", "n_tiles", "section"])
def gist_attn_fwd_kernel(
    buffers, out_ptr, lse_ptr, rule, scale, n_rows, n_local_rows, n_heads, n_tiles, section, META: tl.constexpr
):
    """out ``[B, HEADS, N, D]`` and natural-log LSE ``[B, HEADS, N]`` (both contiguous), one tile of rows a program.

    buffers: q ``[B, HEADS, N, D]``, k v ``[B, HEADS / GROUP, M, D]``, gk gv ``[B, HEADS / GROUP, G, D]``, `strided`,
    with D contiguous; rule: gist_begin, gist_end, local_begin, int32 ``[B, N]``. n_heads = B * HEADS / PACK.
    """
    q, k, v, gk, gv = buffers
    i_tile, i_bh = scheduled(tl.program_id(0), n_tiles, n_heads, section, LAST_FIRST=True)
    i_b, i_h, i_kv = pack_of(i_bh, META)
    o_row, o_head, m_row = query_rows(i_tile * (META.BM // META.PACK), n_rows, i_h, META)
    b_sees = row_intervals(rule, i_b, o_row, m_row, n_rows, n_local_rows)
    columns = visible_columns(b_sees, m_row)
    b_q = load_rows(head_rows(q, i_b, o_head.to(tl.int64), o_row.to(tl.int64)), m_row, META.D, META.BD)
    keys, values = visited(gk, k, i_b, i_kv, columns), visited(gv, v, i_b, i_kv, columns)
    n_cols = columns.n_gist + columns.n_local
    b_acc, b_m, b_l = attend(b_q, keys, values, b_sees, columns, 0, n_cols, scale, META)
    b_out, b_lse = normalized(b_acc, b_m, b_l, scale, sees_nothing(b_sees))
    p_stat = (i_b * META.HEADS + o_head) * n_rows + o_row
    tl.store(lse_ptr + p_stat, b_lse, mask=m_row)
    store_rows(out_ptr + p_stat * META.D, b_out.to(out_ptr.dtype.element_ty), m_row, META.D, META.BD)


def plan_gist_attn_fwd(arguments: AttentionArguments, precision: str) -> Launch:
    """The launch; its buffers are `strided` ones, out, LSE and the intervals, as the kernel takes them."""
    config, meta, counts = row_tiles("fwd", arguments, precision)
    numbers = (arguments.scale, *counts)
    return Launch(
        gist_attn_fwd_kernel, counts[2] * counts[3], numbers, {"META": meta}, config.num_warps, config.num_stages
    )


def launch_gist_attn_fwd(arguments: AttentionArguments, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate out and LSE and fill them; D must be contiguous in q, k, v and the gists."""
    q = arguments.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch = plan_gist_attn_fwd(arguments, precision)
    launch(q.device, strided(*arguments.buffers), out, lse, arguments.intervals)
    return out, lse
