"""Backward of gist-masked attention, key side: dk and dv of a column tile over the rows that see it.

By monotonicity of the three row vectors those rows are one interval, found by a search in the vectors. The
compact (gist) columns have very long intervals, so theirs are cut into chunks with fp32 partial sums that a
second kernel adds up in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, guard, wide_samples
from gistkern.kernels.primitives import (
    count_at_most,
    load_rows,
    matmul,
    probabilities,
    query_rows,
    scheduled,
    store_rows,
)
from gistkern.kernels.schedule import chunk_count, pack_heads, padded, section_heads

__all__ = ["gist_attn_bwd_dkv_kernel", "launch_gist_attn_bwd_dkv", "sum_chunks_kernel"]

# elements one program of the chunk sum handles
SUM_BLOCK = 1024


@triton.jit(do_not_specialize=["n_rows", "n_columns", "tail", "n_heads", "n_tiles", "section", "n_chunks"])
def gist_attn_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    backward_lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    begin_ptr,
    end_ptr,
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
    n_columns,
    tail,
    n_heads,
    n_tiles,
    section,
    n_chunks,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    GIST: tl.constexpr,
):
    """dk, dv ``[n_chunks, B, HEADS / GROUP, n_columns, D]`` (contiguous), one column tile and chunk a program.

    With GIST the columns are the compact rows and begin, end are gist_begin and gist_end; without, they are
    the local rows, begin is local_begin (int32 ``[B, N]``), row i ends at itself, and end is not read.
    WIDE: offsets within one sample of q do not fit int32.
    n_heads = B * HEADS / GROUP; the query heads of a group are summed here.
    """
    i_unit, i_bh = scheduled(tl.program_id(0), n_tiles * n_chunks, n_heads, section, LAST_FIRST=False)
    i_tile = i_unit // n_chunks
    i_chunk = i_unit % n_chunks
    i_b = (i_bh // (HEADS // GROUP)).to(tl.int64)
    i_kv = i_bh % (HEADS // GROUP)
    begin_ptr += i_b * n_rows
    end_ptr += i_b * n_rows
    q_ptr += i_b * stride_qb
    grad_out_ptr += i_b * stride_dob
    backward_lse_ptr += i_b * HEADS * n_rows
    delta_ptr += i_b * HEADS * n_rows

    # rows [row_begin, row_end) see some column of the tile, rows [full_begin, full_end) see all of them
    first = i_tile * BN
    last = tl.minimum(first + BN, n_columns) - 1
    row_end = count_at_most(begin_ptr, n_rows, last)
    full_end = count_at_most(begin_ptr, n_rows, first)
    if GIST:
        row_begin = count_at_most(end_ptr, n_rows, first)
        full_begin = count_at_most(end_ptr, n_rows, last)
    else:
        row_begin = tl.maximum(first - tail, 0)
        full_begin = tl.maximum(last - tail, 0)
    per_step = BM // PACK
    per_chunk = tl.cdiv(tl.maximum(tl.cdiv(row_end - row_begin, per_step), 0), n_chunks) * per_step
    row_begin += i_chunk * per_chunk
    row_end = tl.minimum(row_end, row_begin + per_chunk)

    o_col = first + tl.arange(0, BN)
    m_col = o_col < n_columns
    o_col64 = o_col.to(tl.int64)
    b_k = load_rows(k_ptr + i_b * stride_kb + i_kv.to(tl.int64) * stride_kh + o_col64 * stride_kn, m_col, D, BD)
    b_v = load_rows(v_ptr + i_b * stride_vb + i_kv.to(tl.int64) * stride_vh + o_col64 * stride_vn, m_col, D, BD)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    PACKS: tl.constexpr = GROUP // PACK
    n_steps = tl.maximum(tl.cdiv(row_end - row_begin, per_step), 0) * PACKS
    for i_step in tl.range(0, n_steps):
        i_row = row_begin + (i_step // PACKS) * per_step
        i_h = i_kv * PACKS + i_step % PACKS
        o_row, o_head, m_row = query_rows(i_row, row_end, i_h, PACK, BM)
        if WIDE:
            o_row = o_row.to(tl.int64)
            o_head = o_head.to(tl.int64)
        p_stat = o_head * n_rows + o_row
        b_q = load_rows(q_ptr + o_head * stride_qh + o_row * stride_qn, m_row, D, BD)
        b_do = load_rows(grad_out_ptr + o_head * stride_doh + o_row * stride_don, m_row, D, BD)
        b_lse = tl.load(backward_lse_ptr + p_stat, mask=m_row, other=float("inf"))
        b_delta = tl.load(delta_ptr + p_stat, mask=m_row, other=0.0)
        b_st = matmul(b_k, tl.trans(b_q), PRECISION)  # [BN, BM]
        b_pt = probabilities(b_st, b_lse[None, :], scale, q_ptr.dtype.element_ty == tl.float32)
        if (i_row < full_begin) | (i_row + per_step > full_end):
            b_begin = tl.load(begin_ptr + o_row, mask=m_row, other=0)
            if GIST:
                b_end = tl.load(end_ptr + o_row, mask=m_row, other=0)
            else:
                b_end = o_row + tail + 1
            m_seen = (b_begin[None, :] <= o_col[:, None]) & (o_col[:, None] < b_end[None, :])
            b_pt = tl.where(m_seen, b_pt, 0.0)
        b_dv += matmul(b_pt.to(b_do.dtype), b_do, PRECISION)
        b_dpt = matmul(b_v, tl.trans(b_do), PRECISION)  # [BN, BM]
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        b_dk += matmul(b_dst.to(b_q.dtype), b_q, PRECISION)

    o_out = ((i_chunk * n_heads + i_bh).to(tl.int64) * n_columns + o_col) * D
    store_rows(dk_ptr + o_out, (b_dk * scale).to(dk_ptr.dtype.element_ty), m_col, D, BD)
    store_rows(dv_ptr + o_out, b_dv.to(dv_ptr.dtype.element_ty), m_col, D, BD)


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


def launch_gist_attn_bwd_dkv(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor | None,
    scale: float,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv of one key buffer: the compact rows where `end` (gist_end) is given, else the local rows.

    The compact rows are cut into row chunks where there are too few of them to fill the device.
    """
    batch, heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1:3]
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if columns == 0:
        return dk, dv
    facts, width = facts_of(q.device), padded(dim)
    config = pick("bwd_dkv", facts.arch, width, q.element_size(), dim)
    tiles, kv_total = triton.cdiv(columns, config.block_cols), batch * kv_heads
    chunks = 1 if end is None else chunk_count(tiles * kv_total, rows, facts.multiprocessors)
    part_k, part_v = dk, dv
    if chunks > 1:
        part_k, part_v = (torch.empty((chunks, *k.shape), dtype=torch.float32, device=k.device) for _ in range(2))
    head_bytes = 2 * rows * (heads // kv_heads) * dim * q.element_size()
    with guard(q.device):
        gist_attn_bwd_dkv_kernel[(tiles * chunks * kv_total,)](
            q,
            k,
            v,
            grad_out,
            lse,
            delta,
            part_k,
            part_v,
            begin,
            begin if end is None else end,
            scale,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *grad_out.stride()[:3],
            rows,
            columns,
            columns - rows,
            kv_total,
            tiles,
            section_heads(kv_total, head_bytes, facts.l2_bytes),
            chunks,
            HEADS=heads,
            GROUP=heads // kv_heads,
            PACK=pack_heads(heads // kv_heads, config.block_rows),
            D=dim,
            BD=width,
            BM=config.block_rows,
            BN=config.block_cols,
            PRECISION=precision,
            WIDE=wide_samples(q, grad_out),
            GIST=end is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if chunks > 1:
            grid = (triton.cdiv(dk.numel(), SUM_BLOCK),)
            sum_chunks_kernel[grid](part_k, part_v, dk, dv, dk.numel(), chunks, BLOCK=SUM_BLOCK, num_warps=4)
    return dk, dv
