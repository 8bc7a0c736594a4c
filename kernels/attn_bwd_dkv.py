"""Backward of gist-masked attention, key side: dk and dv of a column tile over the rows that see it.

By monotonicity of the three row vectors those rows are one interval, found by a search in the vectors. The
compact (gist) columns have very long intervals, so theirs are cut into chunks with fp32 partial sums that a
second kernel adds up in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.arguments import Meta, strided
from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, wide_samples
from gistkern.kernels.launch import Launch
from gistkern.kernels.primitives import (
    count_at_most,
    head_rows,
    load_rows,
    matmul,
    probabilities,
    query_rows,
    sample_of,
    scheduled,
    store_rows,
)
from gistkern.kernels.schedule import chunk_count, pack_heads, padded, section_heads

__all__ = ["gist_attn_bwd_dkv_kernel", "launch_gist_attn_bwd_dkv", "plan_gist_attn_bwd_dkv", "sum_chunks_kernel"]

# elements one program of the chunk sum handles
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["n_rows", "n_cols", "n_past", "n_heads", "n_tiles", "section", "n_chunks"])
def gist_attn_bwd_dkv_kernel(
    buffers, stats, grads, rule, scale, n_rows, n_cols, n_past, n_heads, n_tiles, section, n_chunks, META: tl.constexpr
):
    """dk, dv ``[n_chunks, B, HEADS / GROUP, n_cols, D]`` (contiguous), one column tile and chunk a program.

    buffers: q, k, v and grad_out, `strided`; stats: LSE and delta from `gist_attn_bwd_dq_kernel`; grads: dk and dv.
    With GIST the columns are the compact rows and rule is gist_begin and gist_end; without, they are the local rows,
    rule begins with local_begin (int32 ``[B, N]``), row i ends at itself, and the second vector is not read.
    WIDE: offsets within one sample of q do not fit int32.
    n_heads = B * HEADS / GROUP; the query heads of a group are summed here. n_past: local rows before the first query.
    """
    q, k, v, grad_out = buffers
    dk_ptr, dv_ptr = grads
    i_unit, i_bh = scheduled(tl.program_id(0), n_tiles * n_chunks, n_heads, section, LAST_FIRST=False)
    i_tile = i_unit // n_chunks
    i_chunk = i_unit % n_chunks
    i_b = (i_bh // (META.HEADS // META.GROUP)).to(tl.int64)
    i_kv = i_bh % (META.HEADS // META.GROUP)
    begin_ptr = rule[0] + i_b * n_rows
    end_ptr = rule[1] + i_b * n_rows
    q = sample_of(q, i_b)
    grad_out = sample_of(grad_out, i_b)
    backward_lse_ptr = stats[0] + i_b * META.HEADS * n_rows
    delta_ptr = stats[1] + i_b * META.HEADS * n_rows

    # rows [row_begin, row_end) see some column of the tile, rows [full_begin, full_end) see all of them
    first = i_tile * META.BN
    last = tl.minimum(first + META.BN, n_cols) - 1
    row_end = count_at_most(begin_ptr, n_rows, last)
    full_end = count_at_most(begin_ptr, n_rows, first)
    if META.GIST:
        row_begin = count_at_most(end_ptr, n_rows, first)
        full_begin = count_at_most(end_ptr, n_rows, last)
    else:
        row_begin = tl.maximum(first - n_past, 0)
        full_begin = tl.maximum(last - n_past, 0)
    per_step = META.BM // META.PACK
    per_chunk = tl.cdiv(tl.maximum(tl.cdiv(row_end - row_begin, per_step), 0), n_chunks) * per_step
    row_begin += i_chunk * per_chunk
    row_end = tl.minimum(row_end, row_begin + per_chunk)

    o_col = first + tl.arange(0, META.BN)
    m_col = o_col < n_cols
    o_col64 = o_col.to(tl.int64)
    b_k = load_rows(head_rows(k, i_b, i_kv.to(tl.int64), o_col64), m_col, META.D, META.BD)
    b_v = load_rows(head_rows(v, i_b, i_kv.to(tl.int64), o_col64), m_col, META.D, META.BD)
    b_dk = tl.full([META.BN, META.BD], 0.0, tl.float32)
    b_dv = tl.full([META.BN, META.BD], 0.0, tl.float32)
    PRECISION: tl.constexpr = META.PRECISION
    PACKS: tl.constexpr = META.GROUP // META.PACK
    n_steps = tl.maximum(tl.cdiv(row_end - row_begin, per_step), 0) * PACKS
    for i_step in tl.range(0, n_steps):
        i_row = row_begin + (i_step // PACKS) * per_step
        i_h = i_kv * PACKS + i_step % PACKS
        o_row, o_head, m_row = query_rows(i_row, row_end, i_h, META)
        if META.WIDE:
            o_row = o_row.to(tl.int64)
            o_head = o_head.to(tl.int64)
        p_stat = o_head * n_rows + o_row
        b_q = load_rows(head_rows(q, 0, o_head, o_row), m_row, META.D, META.BD)
        b_do = load_rows(head_rows(grad_out, 0, o_head, o_row), m_row, META.D, META.BD)
        b_lse = tl.load(backward_lse_ptr + p_stat, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta_ptr + p_stat, mask=m_row, other=0.0)
        b_st = matmul(b_k, tl.trans(b_q), PRECISION)  # [BN, BM]
        b_pt = probabilities(b_st, b_lse[None, :], scale, b_q.dtype == tl.float32)
        if (i_row < full_begin) | (i_row + per_step > full_end):
            b_begin = tl.load(begin_ptr + o_row, mask=m_row, other=0)
            if META.GIST:
                b_end = tl.load(end_ptr + o_row, mask=m_row, other=0)
            else:
                b_end = o_row + n_past + 1
            m_seen = (b_begin[None, :] <= o_col[:, None]) & (o_col[:, None] < b_end[None, :])
            b_pt = tl.where(m_seen, b_pt, 0.0)
        b_dv += matmul(b_pt.to(b_do.dtype), b_do, PRECISION)
        b_dpt = matmul(b_v, tl.trans(b_do), PRECISION)  # [BN, BM]
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        b_dk += matmul(b_dst.to(b_q.dtype), b_q, PRECISION)

    o_out = ((i_chunk * n_heads + i_bh).to(tl.int64) * n_cols + o_col) * META.D
    store_rows(dk_ptr + o_out, (b_dk * scale).to(dk_ptr.dtype.element_ty), m_col, META.D, META.BD)
    store_rows(dv_ptr + o_out, b_dv.to(dv_ptr.dtype.element_ty), m_col, META.D, META.BD)


@triton.jit(do_not_specialize=["n_elements", "n_chunks"])
def sum_chunks_kernel(part_k_ptr, part_v_ptr, dk_ptr, dv_ptr, n_elements, n_chunks, BLOCK: tl.constexpr):
    """dk, dv ``[n_elements]`` = sums over the first axis of fp32 partials ``[n_chunks, n_elements]``, in order."""
    o_element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_element = o_element < n_elements
    b_dk = tl.zeros([BLOCK], tl.float32)
    b_dv = tl.zeros([BLOCK], tl.float32)
    for i_chunk in tl.range(0, n_chunks):
        o_part = n_elements.to(tl.int64) * i_chunk + o_element
        b_dk += tl.load(part_k_ptr + o_part, mask=m_element, other=0.0)
        b_dv += tl.load(part_v_ptr + o_part, mask=m_element, other=0.0)
    tl.store(dk_ptr + o_element, b_dk.to(dk_ptr.dtype.element_ty), mask=m_element)
    tl.store(dv_ptr + o_element, b_dv.to(dv_ptr.dtype.element_ty), mask=m_element)


def plan_gist_attn_bwd_dkv(
    q: torch.Tensor, k: torch.Tensor, grad_out: torch.Tensor, gist: bool, scale: float, precision: str
) -> tuple[Launch, int]:
    """The launch over the columns of one key buffer, which `gist` tells to be the compact rows; and its row chunks.

    Its buffers are `strided` ones, the stats, the results and the rule's vectors. The compact rows are cut into row
    chunks where there are too few of them to fill the device.
    """
    batch, heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1:3]
    facts, width = facts_of(q.device), padded(dim)
    config = pick("bwd_dkv", facts.arch, width, q.element_size(), dim)
    tiles, kv_total, group = triton.cdiv(columns, config.block_cols), batch * kv_heads, heads // kv_heads
    chunks = chunk_count(tiles * kv_total, rows, facts.multiprocessors) if gist else 1
    pack, wide = pack_heads(group, config.block_rows), wide_samples(q, grad_out)
    meta = Meta(heads, group, pack, dim, width, config.block_rows, config.block_cols, precision, wide, GIST=gist)
    section = section_heads(kv_total, 2 * rows * group * dim * q.element_size(), facts.l2_bytes)
    numbers = scale, rows, columns, columns - rows, kv_total, tiles, section, chunks
    programs = tiles * chunks * kv_total
    return Launch(
        gist_attn_bwd_dkv_kernel, programs, numbers, {"META": meta}, config.num_warps, config.num_stages
    ), chunks


def launch_gist_attn_bwd_dkv(
    buffers: tuple[torch.Tensor, ...],
    rule: tuple[torch.Tensor, ...],
    stats: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv of one key buffer: the compact rows if `rule` is gist_begin and gist_end, else local ones.

    `buffers` are q, k, v and grad_out, `stats` the LSE and delta of `launch_gist_attn_bwd_dq`.
    """
    q, k, _, grad_out = buffers
    results = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if k.shape[2] == 0:
        return results
    gist = len(rule) == 2
    launch, chunks = plan_gist_attn_bwd_dkv(q, k, grad_out, gist, scale, precision)
    parts: tuple[torch.Tensor, ...] = results
    if chunks > 1:
        parts = tuple(torch.empty((chunks, *k.shape), dtype=torch.float32, device=k.device) for _ in range(2))
    launch(q.device, strided(*buffers), stats, parts, rule if gist else rule * 2)
    if chunks > 1:
        count = k.numel()
        Launch(sum_chunks_kernel, triton.cdiv(count, SUM_BLOCK), (count, chunks), {"BLOCK": SUM_BLOCK}, 4)(
            q.device, *parts, *results
        )
    return results
