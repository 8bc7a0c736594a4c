"""Decoding: a few query rows per sequence over its gist rows and tail, split over programs when there are many.

The loop is the forward's (`attend`); lengths stay on the device, so a CUDA graph can replay the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.arguments import AttentionArguments, Meta, strided
from gistkern.kernels.attn_fwd import attend
from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, wide_rows
from gistkern.kernels.launch import Launch
from gistkern.kernels.primitives import (
    head_rows,
    load_rows,
    normalized,
    pack_of,
    query_rows,
    row_intervals,
    sees_nothing,
    softmax_step,
    store_rows,
    visible_columns,
    visited,
)
from gistkern.kernels.schedule import decode_block_rows, pack_heads, padded, split_count

__all__ = ["gist_decode_kernel", "launch_gist_decode", "merge_splits_kernel", "plan_gist_decode"]

# elements of the tile one program of the merge handles
MERGE_ELEMENTS = 4096


@triton.jit(do_not_specialize=["n_rows", "n_local_rows", "n_heads", "n_splits"])
def gist_decode_kernel(
    buffers, out_ptr, lse_ptr, rule, scale, n_rows, n_local_rows, n_heads, n_splits, META: tl.constexpr
):
    """One split of all rows of one pack of heads; arguments as `gist_attn_fwd_kernel` with all N rows in one tile.

    out ``[n_splits, B, HEADS, N, D]`` and lse ``[n_splits, B, HEADS, N]``, contiguous: with more than one split
    both are fp32 partial results for `merge_splits_kernel`. Each split takes an equal share of the columns that
    its sequence really has.
    """
    q, k, v, gk, gv = buffers
    i_split = tl.program_id(0) // n_heads
    i_bh = tl.program_id(0) % n_heads
    i_b, i_h, i_kv = pack_of(i_bh, META)
    o_row, o_head, m_row = query_rows(0, n_rows, i_h, META)
    b_sees = row_intervals(rule, i_b, o_row, m_row, n_rows, n_local_rows)
    columns = visible_columns(b_sees, m_row)
    n_cols = columns.n_gist + columns.n_local
    share = tl.cdiv(tl.cdiv(n_cols, META.BN), n_splits) * META.BN
    col_begin = tl.minimum(i_split * share, n_cols)
    col_end = tl.minimum(col_begin + share, n_cols)
    o_head = o_head.to(tl.int64)
    b_q = load_rows(head_rows(q, i_b, o_head, o_row.to(tl.int64)), m_row, META.D, META.BD)
    keys, values = visited(gk, k, i_b, i_kv, columns), visited(gv, v, i_b, i_kv, columns)
    b_acc, b_m, b_l = attend(b_q, keys, values, b_sees, columns, col_begin, col_end, scale, META)
    b_out, b_lse = normalized(b_acc, b_m, b_l, scale, sees_nothing(b_sees))
    n_stats = n_heads.to(tl.int64) * META.PACK * n_rows
    p_stat = i_split * n_stats + (i_b * META.HEADS + o_head) * n_rows + o_row
    tl.store(lse_ptr + p_stat, b_lse, mask=m_row)
    store_rows(out_ptr + p_stat * META.D, b_out.to(out_ptr.dtype.element_ty), m_row, META.D, META.BD)


@triton.jit(do_not_specialize=["n_stats", "n_splits"])
def merge_splits_kernel(
    parts, out_ptr, lse_ptr, n_stats, n_splits, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):
    """Merge partial out and lse by the LSE (numerics.md): ``[n_splits, n_stats(, D)]`` -> ``[n_stats(, D)]``."""
    o_stat = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    m_stat = o_stat < n_stats
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    for i_split in tl.range(0, n_splits):
        p_stat = n_stats.to(tl.int64) * i_split + o_stat
        b_lse = tl.load(parts[1] + p_stat, mask=m_stat, other=float("-inf"))
        b_part = load_rows(parts[0] + p_stat * D, m_stat, D, BD)
        # each split is one "column" whose score is its LSE
        b_p, b_alpha, b_m, b_l = softmax_step(b_lse[:, None], b_m, b_l, 1.0, True)
        b_acc = b_acc * b_alpha[:, None] + b_p * b_part
    b_out, b_lse = normalized(b_acc, b_m, b_l, 1.0, b_l == 0.0)
    tl.store(lse_ptr + o_stat, b_lse, mask=m_stat)
    store_rows(out_ptr + o_stat * D, b_out.to(out_ptr.dtype.element_ty), m_stat, D, BD)


def plan_gist_decode(arguments: AttentionArguments, precision: str) -> tuple[Launch, Launch | None]:
    """The launch, and the merge where the columns are split: into the launch's number of splits, its last.

    Buffers of the first are `strided` ones, out and LSE (or their partial results) and the intervals; of the merge the
    partial results, out and LSE.
    """
    q, k, gist_k = arguments.q, arguments.k, arguments.gist_k
    batch, heads, rows, dim = q.shape
    kv_heads, local_rows = k.shape[1:3]
    facts, width, group = facts_of(q.device), padded(dim), heads // kv_heads
    config = pick("decode", facts.arch, width, q.element_size(), dim)
    pack = pack_heads(group, config.block_rows // rows)
    packs = batch * heads // pack
    splits = split_count(packs, local_rows + gist_k.shape[2], facts.multiprocessors)
    block, cols, wide = decode_block_rows(rows, pack), config.block_cols, wide_rows(*arguments.buffers[1:])
    meta = Meta(heads, group, pack, dim, width, block, cols, precision, wide, facts.amd, config.two_loops)
    numbers = arguments.scale, rows, local_rows, packs, splits
    launch = Launch(gist_decode_kernel, splits * packs, numbers, {"META": meta}, config.num_warps, config.num_stages)
    if splits == 1:
        return launch, None
    stats, block = batch * heads * rows, max(1, MERGE_ELEMENTS // width)
    merge = Launch(
        merge_splits_kernel, triton.cdiv(stats, block), (stats, splits), {"D": dim, "BD": width, "BM": block}, 4
    )
    return launch, merge


def launch_gist_decode(arguments: AttentionArguments, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate out and LSE and fill them; as `launch_gist_attn_fwd`, with at most `DECODE_ROWS` query rows."""
    q = arguments.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch, merge = plan_gist_decode(arguments, precision)
    parts: tuple[torch.Tensor, ...] = out, lse
    if merge is not None:
        splits = launch.numbers[-1]
        parts = tuple(torch.empty((splits, *t.shape), dtype=torch.float32, device=q.device) for t in parts)
    launch(q.device, strided(*arguments.buffers), *parts, arguments.intervals)
    if merge is not None:
        merge(q.device, parts, out, lse)
    return out, lse
