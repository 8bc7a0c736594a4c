"""Forward of gist-masked attention: one walk over the gist columns, then the local columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, guard, wide_rows
from gistkern.kernels.primitives import (
    load_columns,
    load_rows,
    matmul,
    normalized,
    pack_of,
    query_rows,
    row_bounds,
    row_intervals,
    scheduled,
    seen_columns,
    softmax_step,
    store_rows,
    visible_columns,
)
from gistkern.kernels.schedule import pack_heads, padded, section_heads

__all__ = ["attend", "gist_attn_fwd_kernel", "launch_gist_attn_fwd"]


@triton.jit
def attend_range(
    b_q,
    b_acc,
    b_m,
    b_l,
    p_k,
    p_v,
    p_gk,
    p_gv,
    stride_kn,
    stride_vn,
    stride_gkn,
    stride_gvn,
    b_gist,
    b_gist_end,
    b_local,
    b_local_last,
    n_gist,
    n_full,
    col_begin,
    col_end,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLEND: tl.constexpr,
    MASK: tl.constexpr,
):
    """The online softmax over the visited columns ``[col_begin, col_end)``; accumulators in, accumulators out.

    MASK: ``"none"``, ``"all"``, or ``"boundary"`` for the tiles that reach beyond the first `n_full` columns.
    """
    for i_col in tl.range(col_begin, col_end, BN):
        o_col = i_col + tl.arange(0, BN)
        b_k = load_columns(p_gk, stride_gkn, p_k, stride_kn, o_col, n_gist, col_end, D, BD, WIDE, BLEND)
        b_s = matmul(b_q, tl.trans(b_k), PRECISION)  # [BM, BN]
        if MASK == "all":
            b_s = tl.where(seen_columns(o_col, b_gist, b_gist_end, b_local, b_local_last), b_s, float("-inf"))
        if MASK == "boundary":  # noqa: SIM102 - decided by the compiler, the next by the program
            if i_col + BN > n_full:
                b_s = tl.where(seen_columns(o_col, b_gist, b_gist_end, b_local, b_local_last), b_s, float("-inf"))
        b_p, b_alpha, b_m, b_l = softmax_step(b_s, b_m, b_l, scale, b_q.dtype == tl.float32)
        b_v = load_columns(p_gv, stride_gvn, p_v, stride_vn, o_col, n_gist, col_end, D, BD, WIDE, BLEND)
        b_acc = b_acc * b_alpha[:, None] + matmul(b_p.to(b_v.dtype), b_v, PRECISION)
    return b_acc, b_m, b_l


@triton.jit
def attend(
    b_q,
    p_k,
    p_v,
    p_gk,
    p_gv,
    stride_kn,
    stride_vn,
    stride_gkn,
    stride_gvn,
    b_gist_begin,
    b_gist_end,
    b_local_begin,
    b_local_row,
    gist_lo,
    n_gist,
    local_lo,
    n_full,
    col_begin,
    col_end,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLEND: tl.constexpr,
    TWO_LOOPS: tl.constexpr,
):
    """Attention of a tile of rows ``b_q`` ``[BM, BD]`` over its visited columns ``[col_begin, col_end)``.

    The range starts at a multiple of BN, and ends at one or at the last column.
    Returns the unnormalized output ``[BM, BD]``, the running maximum (of raw scores) and sum ``[BM]``.
    """
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_gist, b_gist_end, b_local, b_local_last = row_bounds(
        b_gist_begin, b_gist_end, b_local_begin, b_local_row, gist_lo, n_gist, local_lo
    )
    p_gk += gist_lo.to(tl.int64) * stride_gkn
    p_gv += gist_lo.to(tl.int64) * stride_gvn
    p_k += (local_lo - n_gist).to(tl.int64) * stride_kn
    p_v += (local_lo - n_gist).to(tl.int64) * stride_vn
    full_end = col_begin
    if TWO_LOOPS:
        full_end = tl.minimum(tl.maximum(n_full // BN * BN, col_begin), col_end)
        b_acc, b_m, b_l = attend_range(
            b_q,
            b_acc,
            b_m,
            b_l,
            p_k,
            p_v,
            p_gk,
            p_gv,
            stride_kn,
            stride_vn,
            stride_gkn,
            stride_gvn,
            b_gist,
            b_gist_end,
            b_local,
            b_local_last,
            n_gist,
            n_full,
            col_begin,
            full_end,
            scale,
            D,
            BD,
            BN,
            PRECISION,
            WIDE,
            BLEND,
            "none",
        )
    return attend_range(
        b_q,
        b_acc,
        b_m,
        b_l,
        p_k,
        p_v,
        p_gk,
        p_gv,
        stride_kn,
        stride_vn,
        stride_gkn,
        stride_gvn,
        b_gist,
        b_gist_end,
        b_local,
        b_local_last,
        n_gist,
        n_full,
        full_end,
        col_end,
        scale,
        D,
        BD,
        BN,
        PRECISION,
        WIDE,
        BLEND,
        "all" if TWO_LOOPS else "boundary",
    )


@triton.jit(do_not_specialize=["n_rows", "n_local_rows", "n_heads", "n_tiles", "section"])
def gist_attn_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gk_ptr,
    gv_ptr,
    out_ptr,
    lse_ptr,
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
    TWO_LOOPS: tl.constexpr,
):
    """out ``[B, HEADS, N, D]`` and natural-log LSE ``[B, HEADS, N]`` (both contiguous), one tile of rows a program.

    q ``[B, HEADS, N, D]``, k v ``[B, HEADS / GROUP, M, D]``, gk gv ``[B, HEADS / GROUP, G, D]`` by strides with D
    contiguous; gist_begin, gist_end, local_begin int32 ``[B, N]``. n_heads = B * HEADS / PACK.
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
    p_q = q_ptr + i_b * stride_qb + o_head.to(tl.int64) * stride_qh + o_row.to(tl.int64) * stride_qn
    b_q = load_rows(p_q, m_row, D, BD)
    b_acc, b_m, b_l = attend(
        b_q,
        k_ptr + i_b * stride_kb + i_kv * stride_kh,
        v_ptr + i_b * stride_vb + i_kv * stride_vh,
        gk_ptr + i_b * stride_gkb + i_kv * stride_gkh,
        gv_ptr + i_b * stride_gvb + i_kv * stride_gvh,
        stride_kn,
        stride_vn,
        stride_gkn,
        stride_gvn,
        b_gist_begin,
        b_gist_end,
        b_local_begin,
        b_local_row,
        gist_lo,
        n_gist,
        local_lo,
        n_full,
        0,
        n_gist + n_local,
        scale,
        D,
        BD,
        BM,
        BN,
        PRECISION,
        WIDE,
        BLEND,
        TWO_LOOPS,
    )
    m_empty = (b_gist_begin >= b_gist_end) & (b_local_begin > b_local_row)
    b_out, b_lse = normalized(b_acc, b_m, b_l, scale, m_empty)
    p_stat = (i_b * HEADS + o_head) * n_rows + o_row
    tl.store(lse_ptr + p_stat, b_lse, mask=m_row)
    store_rows(out_ptr + p_stat * D, b_out.to(out_ptr.dtype.element_ty), m_row, D, BD)


def launch_gist_attn_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gist_k: torch.Tensor,
    gist_v: torch.Tensor,
    gist_begin: torch.Tensor,
    gist_end: torch.Tensor,
    local_begin: torch.Tensor,
    scale: float,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate out and LSE and fill them; arguments as those of the op, with D contiguous in q, k, v and the gists."""
    batch, heads, rows, dim = q.shape
    kv_heads, local_rows = k.shape[1:3]
    facts, width = facts_of(q.device), padded(dim)
    config = pick("fwd", facts.arch, width, q.element_size(), dim)
    pack = pack_heads(heads // kv_heads, config.block_rows)
    tiles, packs = triton.cdiv(rows, config.block_rows // pack), batch * heads // pack
    head_bytes = 2 * (local_rows + gist_k.shape[2]) * dim * q.element_size()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with guard(q.device):
        gist_attn_fwd_kernel[(tiles * packs,)](
            q,
            k,
            v,
            gist_k,
            gist_v,
            out,
            lse,
            gist_begin,
            gist_end,
            local_begin,
            scale,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *gist_k.stride()[:3],
            *gist_v.stride()[:3],
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
            TWO_LOOPS=config.two_loops,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse
