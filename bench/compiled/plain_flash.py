"""Plain causal flash attention, forward: what our kernels' machine code is compared with.

The algorithm is FlashAttention-2 (Dao 2023) as Triton's fused-attention tutorial arranges it: one loop over the
unmasked tiles, one over the diagonal's, pointers that step from tile to tile, statistics in log2. It knows no gists,
documents or packed heads, so it is the least that a flash kernel has to do. For comparison only: the package does not
import it. Shapes and names as `kernels/attn_fwd.py`, with N rows of q, k and v alike.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, guard
from gistkern.kernels.primitives import LN2, LOG2E, load_rows, matmul, store_rows
from gistkern.kernels.schedule import padded

__all__ = ["launch_plain_fwd", "plain_grid", "plain_meta", "plain_strides"]


@triton.jit(do_not_specialize=["n_rows"])
def plain_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
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
    n_rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and natural-log LSE of one tile of rows of one head."""
    i_bh = tl.program_id(1)
    i_b = (i_bh // HEADS).to(tl.int64)
    i_h = (i_bh % HEADS).to(tl.int64)
    # the longest programs start first
    row_begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    o_row = row_begin + tl.arange(0, BM)
    m_row = o_row < n_rows
    b_q = load_rows(q_ptr + i_b * stride_qb + i_h * stride_qh + o_row.to(tl.int64) * stride_qn, m_row, D, BD)
    o_n = tl.arange(0, BN).to(tl.int64)
    p_k = k_ptr + i_b * stride_kb + i_h // GROUP * stride_kh + o_n * stride_kn
    p_v = v_ptr + i_b * stride_vb + i_h // GROUP * stride_vh + o_n * stride_vn
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    qk_scale = scale * LOG2E
    diagonal = row_begin // BN * BN
    for MASKED in tl.static_range(2):
        col_begin = diagonal if MASKED else 0
        col_end = tl.minimum(row_begin + BM, n_rows) if MASKED else diagonal
        for i_col in tl.range(col_begin, col_end, BN):
            o_col = i_col + tl.arange(0, BN)
            # a mask that is true everywhere costs nothing: the compiler drops it
            m_col = o_col < n_rows if MASKED else tl.full([BN], True, tl.int1)
            b_k = load_rows(p_k, m_col, D, BD)  # [BN, BD]
            b_s = matmul(b_q, tl.trans(b_k), PRECISION)  # [BM, BN]
            if MASKED:
                b_s = tl.where(o_col[None, :] <= o_row[:, None], b_s, float("-inf"))
            # every row sees column 0, so -inf - -inf cannot happen
            b_new = tl.maximum(b_m, tl.max(b_s, 1) * qk_scale)
            b_p = tl.exp2(b_s * qk_scale - b_new[:, None])
            b_alpha = tl.exp2(b_m - b_new)
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_m = b_new
            b_v = load_rows(p_v, m_col, D, BD)  # [BN, BD]
            b_acc = b_acc * b_alpha[:, None] + matmul(b_p.to(b_v.dtype), b_v, PRECISION)
            p_k += BN * stride_kn
            p_v += BN * stride_vn
    p_stat = i_bh.to(tl.int64) * n_rows + o_row
    tl.store(lse_ptr + p_stat, (b_m + tl.log2(b_l)) * LN2, mask=m_row)
    store_rows(out_ptr + p_stat * D, (b_acc / b_l[:, None]).to(out_ptr.dtype.element_ty), m_row, D, BD)


def launch_plain_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and natural-log LSE, in the tiles of our forward."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    meta = plain_meta("fwd", q, k, precision)
    with guard(q.device):
        plain_fwd_kernel[plain_grid(q, q.shape[1], meta["BM"])](
            q, k, v, out, lse, scale, *plain_strides(q, k, v), **meta
        )
    return out, lse


def plain_grid(q: torch.Tensor, heads: int, block: int) -> tuple[int, int]:
    """Programs: tiles of `block` rows or columns, times samples and heads."""
    return triton.cdiv(q.shape[2], block), q.shape[0] * heads


def plain_strides(*tensors: torch.Tensor) -> list[int]:
    """The batch, head and row strides of each tensor, then the number of rows."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]] + [tensors[0].shape[2]]


def plain_meta(kernel: str, q: torch.Tensor, k: torch.Tensor, precision: str) -> dict[str, Any]:
    """Constexprs and options: the config of our kernel of that name."""
    width = padded(q.shape[3])
    config = pick(kernel, facts_of(q.device).arch, width, q.element_size())
    return {
        "HEADS": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[3],
        "BD": width,
        "BM": config.block_rows,
        "BN": config.block_cols,
        "PRECISION": precision,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
