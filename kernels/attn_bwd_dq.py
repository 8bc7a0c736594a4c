"""Backward of gist-masked attention, query side: dq and delta, the forward's loop run again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.arguments import AttentionArguments, row_tiles, strided
from gistkern.kernels.launch import Launch
from gistkern.kernels.primitives import (
    backward_lse,
    column_intervals,
    head_rows,
    load_columns,
    load_rows,
    matmul,
    pack_of,
    probabilities,
    query_rows,
    row_intervals,
    scheduled,
    seen_columns,
    store_rows,
    visible_columns,
    visited,
)

__all__ = ["gist_attn_bwd_dq_kernel", "launch_gist_attn_bwd_dq", "plan_gist_attn_bwd_dq"]


@triton.jit(do_not_specialize=["n_rows", "n_local_rows", "n_heads", "n_tiles", "section"])
def gist_attn_bwd_dq_kernel(
    buffers, saved, results, rule, scale, n_rows, n_local_rows, n_heads, n_tiles, section, META: tl.constexpr
):
    """dq ``[B, HEADS, N, D]``, one tile of rows a program, and what dk and dv need of each row.

    That is the LSE as `backward_lse` makes it and delta = rowsum(grad_out * out), fp32 ``[B, HEADS, N]``. Shapes as
    `gist_attn_fwd_kernel`. buffers: q, k, v, gk, gv and grad_out, `strided`; saved: out and lse; results: dq, that LSE
    and delta, all contiguous.
    """
    q, k, v, gk, gv, grad_out = buffers
    out_ptr, lse_ptr = saved
    dq_ptr, backward_lse_ptr, delta_ptr = results
    i_tile, i_bh = scheduled(tl.program_id(0), n_tiles, n_heads, section, LAST_FIRST=True)
    i_b, i_h, i_kv = pack_of(i_bh, META)
    o_row, o_head, m_row = query_rows(i_tile * (META.BM // META.PACK), n_rows, i_h, META)
    b_sees = row_intervals(rule, i_b, o_row, m_row, n_rows, n_local_rows)
    columns = visible_columns(b_sees, m_row)
    n_cols = columns.n_gist + columns.n_local

    o_row = o_row.to(tl.int64)
    o_head = o_head.to(tl.int64)
    p_stat = (i_b * META.HEADS + o_head) * n_rows + o_row
    b_q = load_rows(head_rows(q, i_b, o_head, o_row), m_row, META.D, META.BD)
    b_do = load_rows(head_rows(grad_out, i_b, o_head, o_row), m_row, META.D, META.BD)
    b_out = load_rows(out_ptr + p_stat * META.D, m_row, META.D, META.BD)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(delta_ptr + p_stat, b_delta, mask=m_row)
    FP32: tl.constexpr = b_q.dtype == tl.float32
    b_lse = backward_lse(tl.load(lse_ptr + p_stat, mask=m_row, other=float("-inf")), FP32)
    tl.store(backward_lse_ptr + p_stat, b_lse, mask=m_row)

    b_sees = column_intervals(b_sees, columns)
    keys, values = visited(gk, k, i_b, i_kv, columns), visited(gv, v, i_b, i_kv, columns)
    PRECISION: tl.constexpr = META.PRECISION
    b_dq = tl.full([META.BM, META.BD], 0.0, tl.float32)
    for i_col in tl.range(0, n_cols, META.BN):
        o_col = i_col + tl.arange(0, META.BN)
        b_k = load_columns(keys, o_col, columns.n_gist, n_cols, META)
        b_v = load_columns(values, o_col, columns.n_gist, n_cols, META)
        b_s = matmul(b_q, tl.trans(b_k), PRECISION)  # [BM, BN]
        b_p = probabilities(b_s, b_lse[:, None], scale, FP32)
        if i_col + META.BN > columns.n_full:
            # after exp2: a masked probability is 0 whatever its score was
            b_p = tl.where(seen_columns(o_col, b_sees), b_p, 0.0)
        b_dp = matmul(b_do, tl.trans(b_v), PRECISION)  # [BM, BN]
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += matmul(b_ds.to(b_k.dtype), b_k, PRECISION)
    store_rows(dq_ptr + p_stat * META.D, (b_dq * scale).to(dq_ptr.dtype.element_ty), m_row, META.D, META.BD)


def plan_gist_attn_bwd_dq(arguments: AttentionArguments, precision: str) -> Launch:
    """The launch; its buffers are `strided` ones, (out, LSE), the results and the intervals."""
    config, meta, counts = row_tiles("bwd_dq", arguments, precision)
    numbers = (arguments.scale, *counts)
    return Launch(
        gist_attn_bwd_dq_kernel, counts[2] * counts[3], numbers, {"META": meta}, config.num_warps, config.num_stages
    )


def launch_gist_attn_bwd_dq(
    grad_out: torch.Tensor, arguments: AttentionArguments, out: torch.Tensor, lse: torch.Tensor, precision: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate dq, the backward's LSE and delta and fill them; D must be contiguous, out and lse altogether."""
    q = arguments.q
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows_lse, delta = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    results = dq, rows_lse, delta
    launch = plan_gist_attn_bwd_dq(arguments, precision)
    launch(q.device, strided(*arguments.buffers, grad_out), (out, lse), results, arguments.intervals)
    return results
