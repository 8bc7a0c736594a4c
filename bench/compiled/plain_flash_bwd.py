"""Plain causal flash attention, backward: dq by rows, dk and dv by columns; see bench/compiled/plain_flash.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bench.compiled.plain_flash import plain_grid, plain_meta, plain_strides
from gistkern.kernels.device import guard
from gistkern.kernels.primitives import LOG2E, load_rows, matmul, store_rows

__all__ = ["launch_plain_bwd_dkv", "launch_plain_bwd_dq"]


@triton.jit(do_not_specialize=["n_rows"])
def plain_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_dob,
    stride_doh,
    stride_don,
    n_rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and delta = rowsum(grad_out * out) of one tile of rows of one head."""
    i_bh = tl.program_id(1)
    i_b = (i_bh // HEADS).to(tl.int64)
    i_h = (i_bh % HEADS).to(tl.int64)
    row_begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    o_row = row_begin + tl.arange(0, BM)
    m_row = o_row < n_rows
    o_row64 = o_row.to(tl.int64)
    p_stat = i_bh.to(tl.int64) * n_rows + o_row
    b_q = load_rows(q_ptr + i_b * stride_qb + i_h * stride_qh + o_row64 * stride_qn, m_row, D, BD)
    b_do = load_rows(grad_out_ptr + i_b * stride_dob + i_h * stride_doh + o_row64 * stride_don, m_row, D, BD)
    b_out = load_rows(out_ptr + p_stat * D, m_row, D, BD)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(delta_ptr + p_stat, b_delta, mask=m_row)
    b_lse = tl.load(lse_ptr + p_stat, mask=m_row, other=float("inf")) * LOG2E
    o_n = tl.arange(0, BN).to(tl.int64)
    p_k = k_ptr + i_b * stride_kb + i_h // GROUP * stride_kh + o_n * stride_kn
    p_v = v_ptr + i_b * stride_vb + i_h // GROUP * stride_vh + o_n * stride_vn
    b_dq = tl.zeros([BM, BD], tl.float32)
    qk_scale = scale * LOG2E
    diagonal = row_begin // BN * BN
    for MASKED in tl.static_range(2):
        col_begin = diagonal if MASKED else 0
        col_end = tl.minimum(row_begin + BM, n_rows) if MASKED else diagonal
        for i_col in tl.range(col_begin, col_end, BN):
            o_col = i_col + tl.arange(0, BN)
            m_col = o_col < n_rows if MASKED else tl.full([BN], True, tl.int1)
            b_k = load_rows(p_k, m_col, D, BD)  # [BN, BD]
            b_v = load_rows(p_v, m_col, D, BD)  # [BN, BD]
            b_p = tl.exp2(matmul(b_q, tl.trans(b_k), PRECISION) * qk_scale - b_lse[:, None])  # [BM, BN]
            if MASKED:
                b_p = tl.where(o_col[None, :] <= o_row[:, None], b_p, 0.0)
            b_ds = b_p * (matmul(b_do, tl.trans(b_v), PRECISION) - b_delta[:, None])
            b_dq += matmul(b_ds.to(b_k.dtype), b_k, PRECISION)
            p_k += BN * stride_kn
            p_v += BN * stride_vn
    store_rows(dq_ptr + p_stat * D, (b_dq * scale).to(dq_ptr.dtype.element_ty), m_row, D, BD)


@triton.jit(do_not_specialize=["n_rows"])
def plain_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    stride_dob,
    stride_doh,
    stride_don,
    n_rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one tile of columns of one K/V head, summed over the query heads of its group."""
    i_bh = tl.program_id(1)
    i_b = (i_bh // (HEADS // GROUP)).to(tl.int64)
    i_kv = i_bh % (HEADS // GROUP)
    first = tl.program_id(0) * BN
    o_col = first + tl.arange(0, BN)
    m_col = o_col < n_rows
    o_col64 = o_col.to(tl.int64)
    b_k = load_rows(k_ptr + i_b * stride_kb + i_kv.to(tl.int64) * stride_kh + o_col64 * stride_kn, m_col, D, BD)
    b_v = load_rows(v_ptr + i_b * stride_vb + i_kv.to(tl.int64) * stride_vh + o_col64 * stride_vn, m_col, D, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    qk_scale = scale * LOG2E
    # rows [first, below) cross the diagonal, [below, last) are whole tiles below it, [last, n_rows) the rest
    below = tl.minimum(first + tl.cdiv(BN, BM) * BM, n_rows)
    last = below + (n_rows - below) // BM * BM
    for i_member in tl.range(0, GROUP):
        i_h = (i_kv * GROUP + i_member).to(tl.int64)
        o_first = (first + tl.arange(0, BM)).to(tl.int64)
        p_q = q_ptr + i_b * stride_qb + i_h * stride_qh + o_first * stride_qn
        p_do = grad_out_ptr + i_b * stride_dob + i_h * stride_doh + o_first * stride_don
        o_stat = (i_b * HEADS + i_h) * n_rows
        for PART in tl.static_range(3):
            row_begin = first if PART == 0 else (below if PART == 1 else last)
            row_end = below if PART == 0 else (last if PART == 1 else n_rows)
            for i_row in tl.range(row_begin, row_end, BM):
                o_row = i_row + tl.arange(0, BM)
                m_row = tl.full([BM], True, tl.int1) if PART == 1 else o_row < n_rows
                b_q = load_rows(p_q, m_row, D, BD)  # [BM, BD]
                b_do = load_rows(p_do, m_row, D, BD)  # [BM, BD]
                # a probability of exp2(-inf) = 0 for lanes without a row
                b_lse = tl.load(lse_ptr + o_stat + o_row, mask=m_row, other=float("inf")) * LOG2E
                b_delta = tl.load(delta_ptr + o_stat + o_row, mask=m_row, other=0.0)
                b_pt = tl.exp2(matmul(b_k, tl.trans(b_q), PRECISION) * qk_scale - b_lse[None, :])  # [BN, BM]
                if PART == 0:
                    b_pt = tl.where(o_col[:, None] <= o_row[None, :], b_pt, 0.0)
                b_dv += matmul(b_pt.to(b_do.dtype), b_do, PRECISION)
                b_dst = b_pt * (matmul(b_v, tl.trans(b_do), PRECISION) - b_delta[None, :])
                b_dk += matmul(b_dst.to(b_q.dtype), b_q, PRECISION)
                p_q += BM * stride_qn
                p_do += BM * stride_don
    o_out = (i_bh.to(tl.int64) * n_rows + o_col) * D
    store_rows(dk_ptr + o_out, (b_dk * scale).to(dk_ptr.dtype.element_ty), m_col, D, BD)
    store_rows(dv_ptr + o_out, b_dv.to(dv_ptr.dtype.element_ty), m_col, D, BD)


def launch_plain_bwd_dq(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dq and delta, in the tiles of our dq kernel."""
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    meta = plain_meta("bwd_dq", q, k, precision)
    tensors = q, k, v, out, grad_out, lse, delta, dq
    with guard(q.device):
        plain_bwd_dq_kernel[plain_grid(q, q.shape[1], meta["BM"])](
            *tensors, scale, *plain_strides(q, k, v, grad_out), **meta
        )
    return dq, delta


def launch_plain_bwd_dkv(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    scale: float,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv, in the tiles of our dkv kernel."""
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    meta = plain_meta("bwd_dkv", q, k, precision)
    tensors = q, k, v, grad_out, lse, delta, dk, dv
    with guard(q.device):
        plain_bwd_dkv_kernel[plain_grid(q, k.shape[1], meta["BN"])](
            *tensors, scale, *plain_strides(q, k, v, grad_out), **meta
        )
    return dk, dv
