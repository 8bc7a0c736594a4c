"""Plain causal flash attention: what our kernels' machine code is compared with.

The algorithm is FlashAttention-2 (Dao 2023) as Triton's fused-attention tutorial arranges it: one loop over the
unmasked tiles, one over the diagonal's, pointers that step from tile to tile, statistics in log2; backward by rows for
dq, by columns for dk and dv. It knows no gists, documents or packed heads, so it is the least that a flash kernel has
to do. The package does not import it. Shapes and names as in kernels/, with N rows of q, k and v alike.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gistkern.kernels.arguments import strided
from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, guard
from gistkern.kernels.primitives import LN2, LOG2E, head_rows, load_rows, matmul, store_rows
from gistkern.kernels.schedule import padded


class Plain(NamedTuple):
    """The compile-time constants, as `gistkern.kernels.arguments.Meta` has them."""

    HEADS: int
    GROUP: int
    D: int
    BD: int
    BM: int
    BN: int
    PRECISION: str


@triton.jit(do_not_specialize=["n_rows"])
def plain_fwd_kernel(buffers, out_ptr, lse_ptr, scale, n_rows, META: tl.constexpr):
    """out and natural-log LSE of one tile of rows of one head; buffers: q, k and v, `strided`."""
    q, k, v = buffers
    i_bh = tl.program_id(1)
    i_b = (i_bh // META.HEADS).to(tl.int64)
    i_h = (i_bh % META.HEADS).to(tl.int64)
    # the longest programs start first
    row_begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * META.BM
    o_row = row_begin + tl.arange(0, META.BM)
    m_row = o_row < n_rows
    b_q = load_rows(head_rows(q, i_b, i_h, o_row.to(tl.int64)), m_row, META.D, META.BD)
    o_n = tl.arange(0, META.BN).to(tl.int64)
    p_k = head_rows(k, i_b, i_h // META.GROUP, o_n)
    p_v = head_rows(v, i_b, i_h // META.GROUP, o_n)
    b_acc = tl.full([META.BM, META.BD], 0.0, tl.float32)
    b_m = tl.full([META.BM], float("-inf"), tl.float32)
    b_l = tl.full([META.BM], 0.0, tl.float32)
    qk_scale = scale * LOG2E
    diagonal = row_begin // META.BN * META.BN
    for MASKED in tl.static_range(2):
        col_begin = diagonal if MASKED else 0
        col_end = tl.minimum(row_begin + META.BM, n_rows) if MASKED else diagonal
        for i_col in tl.range(col_begin, col_end, META.BN):
            o_col = i_col + tl.arange(0, META.BN)
            # a mask that is true everywhere costs nothing: the compiler drops it
            m_col = o_col < n_rows if MASKED else tl.full([META.BN], True, tl.int1)
            b_k = load_rows(p_k, m_col, META.D, META.BD)  # [BN, BD]
            b_s = matmul(b_q, tl.trans(b_k), META.PRECISION)  # [BM, BN]
            if MASKED:
                b_s = tl.where(o_col[None, :] <= o_row[:, None], b_s, float("-inf"))
            # every row sees column 0, so -inf - -inf cannot happen
            b_new = tl.maximum(b_m, tl.max(b_s, 1) * qk_scale)
            b_p = tl.exp2(b_s * qk_scale - b_new[:, None])
            b_alpha = tl.exp2(b_m - b_new)
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_m = b_new
            b_v = load_rows(p_v, m_col, META.D, META.BD)  # [BN, BD]
            b_acc = b_acc * b_alpha[:, None] + matmul(b_p.to(b_v.dtype), b_v, META.PRECISION)
            p_k += META.BN * k[1][2]
            p_v += META.BN * v[1][2]
    p_stat = i_bh.to(tl.int64) * n_rows + o_row
    tl.store(lse_ptr + p_stat, (b_m + tl.log2(b_l)) * LN2, mask=m_row)
    b_out = (b_acc / b_l[:, None]).to(out_ptr.dtype.element_ty)
    store_rows(out_ptr + p_stat * META.D, b_out, m_row, META.D, META.BD)


@triton.jit(do_not_specialize=["n_rows"])
def plain_bwd_dq_kernel(buffers, out_ptr, lse_ptr, delta_ptr, dq_ptr, scale, n_rows, META: tl.constexpr):
    """dq and delta = rowsum(grad_out * out) of one tile of rows; buffers: q, k, v and grad_out, `strided`."""
    q, k, v, grad_out = buffers
    i_bh = tl.program_id(1)
    i_b = (i_bh // META.HEADS).to(tl.int64)
    i_h = (i_bh % META.HEADS).to(tl.int64)
    row_begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * META.BM
    o_row = row_begin + tl.arange(0, META.BM)
    m_row = o_row < n_rows
    p_stat = i_bh.to(tl.int64) * n_rows + o_row
    b_q = load_rows(head_rows(q, i_b, i_h, o_row.to(tl.int64)), m_row, META.D, META.BD)
    b_do = load_rows(head_rows(grad_out, i_b, i_h, o_row.to(tl.int64)), m_row, META.D, META.BD)
    b_out = load_rows(out_ptr + p_stat * META.D, m_row, META.D, META.BD)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(delta_ptr + p_stat, b_delta, mask=m_row)
    b_lse = tl.load(lse_ptr + p_stat, mask=m_row, other=float("inf")) * LOG2E
    o_n = tl.arange(0, META.BN).to(tl.int64)
    p_k = head_rows(k, i_b, i_h // META.GROUP, o_n)
    p_v = head_rows(v, i_b, i_h // META.GROUP, o_n)
    b_dq = tl.full([META.BM, META.BD], 0.0, tl.float32)
    qk_scale = scale * LOG2E
    diagonal = row_begin // META.BN * META.BN
    for MASKED in tl.static_range(2):
        col_begin = diagonal if MASKED else 0
        col_end = tl.minimum(row_begin + META.BM, n_rows) if MASKED else diagonal
        for i_col in tl.range(col_begin, col_end, META.BN):
            o_col = i_col + tl.arange(0, META.BN)
            m_col = o_col < n_rows if MASKED else tl.full([META.BN], True, tl.int1)
            b_k = load_rows(p_k, m_col, META.D, META.BD)  # [BN, BD]
            b_v = load_rows(p_v, m_col, META.D, META.BD)  # [BN, BD]
            b_p = tl.exp2(matmul(b_q, tl.trans(b_k), META.PRECISION) * qk_scale - b_lse[:, None])  # [BM, BN]
            if MASKED:
                b_p = tl.where(o_col[None, :] <= o_row[:, None], b_p, 0.0)
            b_ds = b_p * (matmul(b_do, tl.trans(b_v), META.PRECISION) - b_delta[:, None])
            b_dq += matmul(b_ds.to(b_k.dtype), b_k, META.PRECISION)
            p_k += META.BN * k[1][2]
            p_v += META.BN * v[1][2]
    store_rows(dq_ptr + p_stat * META.D, (b_dq * scale).to(dq_ptr.dtype.element_ty), m_row, META.D, META.BD)


@triton.jit(do_not_specialize=["n_rows"])
def plain_bwd_dkv_kernel(buffers, lse_ptr, delta_ptr, dk_ptr, dv_ptr, scale, n_rows, META: tl.constexpr):
    """dk and dv of one tile of columns of one K/V head, summed over the query heads of its group."""
    q, k, v, grad_out = buffers
    i_bh = tl.program_id(1)
    i_b = (i_bh // (META.HEADS // META.GROUP)).to(tl.int64)
    i_kv = i_bh % (META.HEADS // META.GROUP)
    first = tl.program_id(0) * META.BN
    o_col = first + tl.arange(0, META.BN)
    m_col = o_col < n_rows
    b_k = load_rows(head_rows(k, i_b, i_kv.to(tl.int64), o_col.to(tl.int64)), m_col, META.D, META.BD)
    b_v = load_rows(head_rows(v, i_b, i_kv.to(tl.int64), o_col.to(tl.int64)), m_col, META.D, META.BD)
    b_dk = tl.full([META.BN, META.BD], 0.0, tl.float32)
    b_dv = tl.full([META.BN, META.BD], 0.0, tl.float32)
    qk_scale = scale * LOG2E
    # rows [first, below) cross the diagonal, [below, last) are whole tiles below it, [last, n_rows) the rest
    below = tl.minimum(first + tl.cdiv(META.BN, META.BM) * META.BM, n_rows)
    last = below + (n_rows - below) // META.BM * META.BM
    for i_member in tl.range(0, META.GROUP):
        i_h = (i_kv * META.GROUP + i_member).to(tl.int64)
        o_first = (first + tl.arange(0, META.BM)).to(tl.int64)
        p_q = head_rows(q, i_b, i_h, o_first)
        p_do = head_rows(grad_out, i_b, i_h, o_first)
        o_stat = (i_b * META.HEADS + i_h) * n_rows
        for PART in tl.static_range(3):
            row_begin = first if PART == 0 else (below if PART == 1 else last)
            row_end = below if PART == 0 else (last if PART == 1 else n_rows)
            for i_row in tl.range(row_begin, row_end, META.BM):
                o_row = i_row + tl.arange(0, META.BM)
                m_row = tl.full([META.BM], True, tl.int1) if PART == 1 else o_row < n_rows
                b_q = load_rows(p_q, m_row, META.D, META.BD)  # [BM, BD]
                b_do = load_rows(p_do, m_row, META.D, META.BD)  # [BM, BD]
                # a probability of exp2(-inf) = 0 for lanes without a row
                b_lse = tl.load(lse_ptr + o_stat + o_row, mask=m_row, other=float("inf")) * LOG2E
                b_delta = tl.load(delta_ptr + o_stat + o_row, mask=m_row, other=0.0)
                b_pt = tl.exp2(matmul(b_k, tl.trans(b_q), META.PRECISION) * qk_scale - b_lse[None, :])  # [BN, BM]
                if PART == 0:
                    b_pt = tl.where(o_col[:, None] <= o_row[None, :], b_pt, 0.0)
                b_dv += matmul(b_pt.to(b_do.dtype), b_do, META.PRECISION)
                b_dst = b_pt * (matmul(b_v, tl.trans(b_do), META.PRECISION) - b_delta[None, :])
                b_dk += matmul(b_dst.to(b_q.dtype), b_q, META.PRECISION)
                p_q += META.BM * q[1][2]
                p_do += META.BM * grad_out[1][2]
    o_out = (i_bh.to(tl.int64) * n_rows + o_col) * META.D
    store_rows(dk_ptr + o_out, (b_dk * scale).to(dk_ptr.dtype.element_ty), m_col, META.D, META.BD)
    store_rows(dv_ptr + o_out, b_dv.to(dv_ptr.dtype.element_ty), m_col, META.D, META.BD)


_KERNELS = {"fwd": plain_fwd_kernel, "bwd_dq": plain_bwd_dq_kernel, "bwd_dkv": plain_bwd_dkv_kernel}


def launch_plain(
    kernel: str, buffers: tuple[torch.Tensor, ...], rest: tuple[torch.Tensor, ...], scale: float, precision: str
) -> None:
    """``"fwd"``, ``"bwd_dq"`` or ``"bwd_dkv"``, in the tiles of ours of that name; `rest` are its other tensors."""
    q, k = buffers[:2]
    width, heads = padded(q.shape[3]), q.shape[1]
    config = pick(kernel, facts_of(q.device).arch, width, q.element_size())
    tile = config.block_rows, config.block_cols
    # a program for each tile of rows of a head, for dk and dv of columns
    programs = (k.shape[1], tile[1]) if kernel == "bwd_dkv" else (heads, tile[0])
    with guard(q.device):
        _KERNELS[kernel][triton.cdiv(q.shape[2], programs[1]), q.shape[0] * programs[0]](
            *(strided(*buffers), *rest, scale, q.shape[2]),
            META=Plain(heads, heads // k.shape[1], q.shape[3], width, *tile, precision),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
