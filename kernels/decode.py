"""Decoding: a few query rows per sequence over its gist rows and tail, split over programs when there are many.

The loop is the forward's (`attend`); lengths stay on the device, so a CUDA graph can replay the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.attn_fwd import attend
from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, guard, wide_rows
from gistkern.kernels.primitives import (
    load_rows,
    normalized,
    pack_of,
    query_rows,
    row_intervals,
    softmax_step,
    store_rows,
    visible_columns,
)
from gistkern.kernels.schedule import decode_block_rows, pack_heads, padded, split_count

__all__ = ["gist_decode_kernel", "launch_gist_decode", "merge_splits_kernel"]

# elements of the tile one program of the merge handles
MERGE_ELEMENTS = 4096


@triton.jit(do_not_specialize=["n_rows", "n_local_rows", "n_heads", "n_splits"])
def gist_decode_kernel(
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
    n_splits,
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
    """One split of all rows of one pack of heads; shapes as `gist_attn_fwd_kernel` with all N rows in one tile.

    out ``[n_splits, B, HEADS, N, D]`` and lse ``[n_splits, B, HEADS, N]``, contiguous: with more than one split
    both are fp32 partial results for `merge_splits_kernel`. Each split takes an equal share of the columns that
    its sequence really has.
    """
    i_split = tl.program_id(0) // n_heads
    i_bh = tl.program_id(0) % n_heads
    i_b, i_h, i_kv = pack_of(i_bh, HEADS, GROUP, PACK)
    o_row, o_head, m_row = query_rows(0, n_rows, i_h, PACK, BM)
    b_gist_begin, b_gist_end, b_local_begin = row_intervals(
        gist_begin_ptr, gist_end_ptr, local_begin_ptr, i_b * n_rows + o_row, m_row
    )
    b_local_row = o_row + (n_local_rows - n_rows)
    gist_lo, n_gist, local_lo, n_local, n_full = visible_columns(
        b_gist_begin, b_gist_end, b_local_begin, b_local_row, m_row
    )
    n_cols = n_gist + n_local
    share = tl.cdiv(tl.cdiv(n_cols, BN), n_splits) * BN
    col_begin = tl.minimum(i_split * share, n_cols)
    o_head = o_head.to(tl.int64)
    p_q = q_ptr + i_b * stride_qb + o_head * stride_qh + o_row.to(tl.int64) * stride_qn
    b_acc, b_m, b_l = attend(
        load_rows(p_q, m_row, D, BD),
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
        col_begin,
        tl.minimum(col_begin + share, n_cols),
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
    n_stats = n_heads.to(tl.int64) * PACK * n_rows
    p_stat = i_split * n_stats + (i_b * HEADS + o_head) * n_rows + o_row
    tl.store(lse_ptr + p_stat, b_lse, mask=m_row)
    store_rows(out_ptr + p_stat * D, b_out.to(out_ptr.dtype.element_ty), m_row, D, BD)


@triton.jit(do_not_specialize=["n_stats", "n_splits"])
def merge_splits_kernel(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    n_stats,
    n_splits,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """Merge partial results by their LSE (docs/numerics.md): ``[n_splits, n_stats(, D)]`` -> ``[n_stats(, D)]``."""
    o_stat = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_stat = o_stat < n_stats
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for i_split in tl.range(0, n_splits):
        p_stat = n_stats.to(tl.int64) * i_split + o_stat
        b_lse = tl.load(part_lse_ptr + p_stat, mask=m_stat, other=float("-inf"))
        b_part = load_rows(part_out_ptr + p_stat * D, m_stat, D, BD)
        # each split is one "column" whose score is its LSE
        b_p, b_alpha, b_m, b_l = softmax_step(b_lse[:, None], b_m, b_l, 1.0, True)
        b_acc = b_acc * b_alpha[:, None] + b_p * b_part
    b_out, b_lse = normalized(b_acc, b_m, b_l, 1.0, b_l == 0.0)
    tl.store(lse_ptr + o_stat, b_lse, mask=m_stat)
    store_rows(out_ptr + o_stat * D, b_out.to(out_ptr.dtype.element_ty), m_stat, D, BD)


def launch_gist_decode(
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
    """Allocate out and LSE and fill them; arguments as `gistkern.ops.library` with at most `DECODE_ROWS` query rows."""
    batch, heads, rows, dim = q.shape
    kv_heads, local_rows = k.shape[1:3]
    facts, width = facts_of(q.device), padded(dim)
    config = pick("decode", facts.arch, width, q.element_size(), dim)
    pack = pack_heads(heads // kv_heads, config.block_rows // rows)
    packs = batch * heads // pack
    splits = split_count(packs, local_rows + gist_k.shape[2], facts.multiprocessors)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out, part_lse = (torch.empty((splits, *t.shape), dtype=torch.float32, device=q.device) for t in (out, lse))
    with guard(q.device):
        gist_decode_kernel[(splits * packs,)](
            q,
            k,
            v,
            gist_k,
            gist_v,
            part_out,
            part_lse,
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
            splits,
            HEADS=heads,
            GROUP=heads // kv_heads,
            PACK=pack,
            D=dim,
            BD=width,
            BM=decode_block_rows(rows, pack),
            BN=config.block_cols,
            PRECISION=precision,
            WIDE=wide_rows(k, v, gist_k, gist_v),
            BLEND=facts.amd,
            TWO_LOOPS=config.two_loops,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            block = max(1, MERGE_ELEMENTS // width)
            grid = (triton.cdiv(lse.numel(), block),)
            merge_splits_kernel[grid](
                part_out, part_lse, out, lse, lse.numel(), splits, D=dim, BD=width, BM=block, num_warps=4
            )
    return out, lse
