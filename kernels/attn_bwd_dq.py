"""Backward of gist-masked attention, query side: dq and delta, the forward's loop run again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, guard, wide_rows
from gistkern.kernels.primitives import (
    backward_lse,
    load_columns,
    load_rows,
    matmul,
    pack_of,
    probabilities,
    query_rows,
    row_bounds,
    row_intervals,
    scheduled,
    seen_columns,
    store_rows,
    visible_columns,
)
from gistkern.kernels.schedule import pack_heads, padded, section_heads

__all__ = ["gist_attn_bwd_dq_kernel", "launch_gist_attn_bwd_dq"]


@triton.jit(do_not_specialize=["n_rows", "n_local_rows", "n_heads", "n_tiles", "section"])
def gist_attn_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gk_ptr,
    gv_ptr,
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    backward_lse_ptr,
    delta_ptr,
    dq_ptr,
    gist_begin_ptr,
    gist_end_ptr,
    local_begin_ptr,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gkb,
    stride_gkh,
    stride_gkn,
    stride_gvb,
    stride_gvh,
    stride_gvn,
    stride_dob,
    stride_doh,
    stride_don,
    n_rows,
    n_local_rows,
    n_heads,
    n_tiles,
    section,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLEND: tl.constexpr,
):
    """dq ``[B, HEADS, N, D]``, one tile of rows a program, and what dk and dv need of each row.

    That is delta = rowsum(grad_out * out) and the LSE as `backward_lse` makes it, fp32 ``[B, HEADS, N]``. Shapes as
    `gist_attn_fwd_kernel`; out, lse and all results contiguous, grad_out by strides.
    """
    i_tile, i_bh = scheduled(tl.program_id(0), n_tiles, n_heads, section, LAST_FIRST=True)
    i_b, i_h, i_kv = pack_of(i_bh, HEADS, GROUP, PACK)
    o_row, o_head, m_row = query_rows(i_tile * (BM // PACK), n_rows, i_h, PACK, BM)
    b_gist_begin, b_gist_end, b_local_begin = row_intervals(
        gist_begin_ptr, gist_end_ptr, local_begin_ptr, i_b * n_rows + o_row, m_row
    )
    b_local_row = o_row + (n_local_rows - n_rows)
    gist_lo, n_gist, local_lo, n_local, n_full = visible_columns(
        b_gist_begin, b_gist_end, b_local_begin, b_local_row, m_row
    )
    n_cols = n_gist + n_local

    o_row = o_row.to(tl.int64)
    o_head = o_head.to(tl.int64)
    p_stat = (i_b * HEADS + o_head) * n_rows + o_row
    b_q = load_rows(q_ptr + i_b * stride_qb + o_head * stride_qh + o_row * stride_qn, m_row, D, BD)
    b_do = load_rows(grad_out_ptr + i_b * stride_dob + o_head * stride_doh + o_row * stride_don, m_row, D, BD)
    b_out = load_rows(out_ptr + p_stat * D, m_row, D, BD)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(delta_ptr + p_stat, b_delta, mask=m_row)
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    b_lse = backward_lse(tl.load(lse_ptr + p_stat, mask=m_row, other=float("-inf")), FP32)
    tl.store(backward_lse_ptr + p_stat, b_lse, mask=m_row)

    b_gist, b_gist_end, b_local, b_local_last = row_bounds(
        b_gist_begin, b_gist_end, b_local_begin, b_local_row, gist_lo, n_gist, local_lo
    )
    gist_lo = gist_lo.to(tl.int64)
    local_lo = (local_lo - n_gist).to(tl.int64)
    p_k = k_ptr + i_b * stride_kb + i_kv * stride_kh + local_lo * stride_kn
    p_v = v_ptr + i_b * stride_vb + i_kv * stride_vh + local_lo * stride_vn
    p_gk = gk_ptr + i_b * stride_gkb + i_kv * stride_gkh + gist_lo * stride_gkn
    p_gv = gv_ptr + i_b * stride_gvb + i_kv * stride_gvh + gist_lo * stride_gvn
    b_dq = tl.zeros([BM, BD], tl.float32)
    for i_col in tl.range(0, n_cols, BN):
        o_col = i_col + tl.arange(0, BN)
        b_k = load_columns(p_gk, stride_gkn, p_k, stride_kn, o_col, n_gist, n_cols, D, BD, WIDE, BLEND)
        b_v = load_columns(p_gv, stride_gvn, p_v, stride_vn, o_col, n_gist, n_cols, D, BD, WIDE, BLEND)
        b_s = matmul(b_q, tl.trans(b_k), PRECISION)  # [BM, BN]
        b_p = probabilities(b_s, b_lse[:, None], scale, FP32)
        if i_col + BN > n_full:
            # after exp2: a masked probability is 0 whatever its score was
            b_p = tl.where(seen_columns(o_col, b_gist, b_gist_end, b_local, b_local_last), b_p, 0.0)
        b_dp = matmul(b_do, tl.trans(b_v), PRECISION)  # [BM, BN]
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += matmul(b_ds.to(b_k.dtype), b_k, PRECISION)
    store_rows(dq_ptr + p_stat * D, (b_dq * scale).to(dq_ptr.dtype.element_ty), m_row, D, BD)


def launch_gist_attn_bwd_dq(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gist_k: torch.Tensor,
    gist_v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    gist_begin: torch.Tensor,
    gist_end: torch.Tensor,
    local_begin: torch.Tensor,
    scale: float,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate dq, the backward's LSE and delta and fill them; arguments as those of the op, with D contiguous."""
    batch, heads, rows, dim = q.shape
    kv_heads, local_rows = k.shape[1:3]
    facts, width = facts_of(q.device), padded(dim)
    config = pick("bwd_dq", facts.arch, width, q.element_size(), dim)
    pack = pack_heads(heads // kv_heads, config.block_rows)
    tiles, packs = triton.cdiv(rows, config.block_rows // pack), batch * heads // pack
    head_bytes = 2 * (local_rows + gist_k.shape[2]) * dim * q.element_size()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows_lse, delta = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    with guard(q.device):
        gist_attn_bwd_dq_kernel[(tiles * packs,)](
            q,
            k,
            v,
            gist_k,
            gist_v,
            out,
            grad_out,
            lse,
            rows_lse,
            delta,
            dq,
            gist_begin,
            gist_end,
            local_begin,
            scale,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *gist_k.stride()[:3],
            *gist_v.stride()[:3],
            *grad_out.stride()[:3],
            rows,
            local_rows,
            packs,
            tiles,
            section_heads(packs, head_bytes, facts.l2_bytes),
            HEADS=heads,
            GROUP=heads // kv_heads,
            PACK=pack,
            D=dim,
            BD=width,
            BM=config.block_rows,
            BN=config.block_cols,
            PRECISION=precision,
            WIDE=wide_rows(k, v, gist_k, gist_v),
            BLEND=facts.amd,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dq, rows_lse, delta
