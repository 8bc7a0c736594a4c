"""The gradients of compact rows, put back where the rows came from: the last kernel of a backward, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.arguments import strided
from gistkern.kernels.compact import CopyMeta
from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of
from gistkern.kernels.launch import Launch
from gistkern.kernels.primitives import head_rows, load_rows, matmul, store_rows
from gistkern.kernels.schedule import padded

__all__ = ["gist_fold_kernel", "launch_gist_compact_bwd", "plan_gist_fold"]

# of a tile: 32 of 64 elements in fp32 spill registers on sm_90
MOST_ROWS = 16


@triton.jit
def chunk_sum(part, o_chunk, n_chunks, i_b, i_kv, o_row, m_row, META: tl.constexpr):
    """fp32 ``[BG, BD]``: rows `o_row` of a head, summed over the chunks, `o_chunk` elements apart, in order."""
    b_sum = tl.full([META.BG, META.BD], 0.0, tl.float32)
    p_rows = head_rows(part, i_b, i_kv, o_row.to(tl.int64))
    for i_chunk in tl.range(0, n_chunks):
        b_sum += load_rows(p_rows + o_chunk * i_chunk, m_row, META.D, META.BD).to(tl.float32)
    return b_sum


@triton.jit(do_not_specialize=["n_past", "n_compact", "n_local_rows", "n_heads", "n_chunks"])
def gist_fold_kernel(
    parts, gather_ptr, past, results, n_past, n_compact, n_local_rows, n_heads, n_chunks, META: tl.constexpr
):
    """Add the gradients of gathered rows to dk and dv ``[B, HEADS, M, D]`` (results), write those of past rows (past).

    parts: gradients of gist_k and gist_v ``[B, HEADS, n_compact, D]``, `strided`, perhaps in n_chunks partial sums, one
    contiguous tensor behind the other; gather: int64 ``[B, n_compact - n_past]``, -1 for a filler; past: contiguous
    ``[B, HEADS, n_past, D]``. n_heads = B * HEADS. A token listed several times is written by the program of its first
    entry only, which adds the later entries to it in order.
    """
    n_tiles = tl.cdiv(n_compact, META.BG)
    i_bh = tl.program_id(0) // n_tiles
    i_b = (i_bh // META.HEADS).to(tl.int64)
    i_kv = (i_bh % META.HEADS).to(tl.int64)
    n_gathered = n_compact - n_past
    gather_ptr += i_b * n_gathered
    o_chunk = n_heads.to(tl.int64) * n_compact * META.D
    o_compact = tl.program_id(0) % n_tiles * META.BG + tl.arange(0, META.BG)
    m_past = o_compact < n_past
    o_mine = o_compact - n_past
    o_local = tl.load(gather_ptr + o_mine, mask=(o_compact < n_compact) & ~m_past, other=-1)
    m_mine = o_local >= 0
    b_dk = chunk_sum(parts[0], o_chunk, n_chunks, i_b, i_kv, o_compact, m_past | m_mine, META)
    b_dv = chunk_sum(parts[1], o_chunk, n_chunks, i_b, i_kv, o_compact, m_past | m_mine, META)
    n_earlier = tl.full([META.BG], 0, tl.int32)
    for i_entry in range(0, n_gathered, META.BG):
        o_entry = i_entry + tl.arange(0, META.BG)
        m_entry = o_entry < n_gathered
        o_other = tl.load(gather_ptr + o_entry, mask=m_entry, other=-2)
        m_same = (o_local[:, None] == o_other[None, :]) & m_mine[:, None]  # [BG, BG]
        m_same = m_same & (o_entry[None, :] != o_mine[:, None])
        n_earlier += tl.sum((m_same & (o_entry[None, :] < o_mine[:, None])).to(tl.int32), 1)
        # repeats are rare (attention sinks); a product with 0 and 1 would spread an infinity to the whole tile
        if tl.max(tl.sum(m_same.to(tl.int32), 1), 0) > 0:
            b_same = m_same.to(tl.float32)
            b_dk += matmul(
                b_same, chunk_sum(parts[0], o_chunk, n_chunks, i_b, i_kv, o_entry + n_past, m_entry, META), "ieee"
            )
            b_dv += matmul(
                b_same, chunk_sum(parts[1], o_chunk, n_chunks, i_b, i_kv, o_entry + n_past, m_entry, META), "ieee"
            )
    m_write = m_mine & (n_earlier == 0)
    p_out = (i_bh.to(tl.int64) * n_local_rows + o_local) * META.D
    b_dk_local = load_rows(results[0] + p_out, m_write, META.D, META.BD).to(tl.float32)
    b_dv_local = load_rows(results[1] + p_out, m_write, META.D, META.BD).to(tl.float32)
    store_rows(results[0] + p_out, (b_dk_local + b_dk).to(results[0].dtype.element_ty), m_write, META.D, META.BD)
    store_rows(results[1] + p_out, (b_dv_local + b_dv).to(results[1].dtype.element_ty), m_write, META.D, META.BD)
    p_past = (i_bh.to(tl.int64) * n_past + o_compact) * META.D
    store_rows(past[0] + p_past, b_dk.to(past[0].dtype.element_ty), m_past, META.D, META.BD)
    store_rows(past[1] + p_past, b_dv.to(past[1].dtype.element_ty), m_past, META.D, META.BD)


def plan_gist_fold(like: torch.Tensor, n_past: int, n_compact: int, chunks: int) -> Launch:
    """The launch for dk and dv like `like` ``[B, Hkv, M, D]``; buffers in the order of the kernel's parameters."""
    batch, heads, local_rows, dim = like.shape
    width = padded(dim)
    config = pick("compact", facts_of(like.device).arch, width, like.element_size())
    rows = min(config.block_rows, MOST_ROWS)
    programs = triton.cdiv(n_compact, rows) * batch * heads
    numbers = n_past, n_compact, local_rows, batch * heads, chunks
    meta = CopyMeta(heads, dim, width, rows)
    return Launch(gist_fold_kernel, programs, numbers, {"META": meta}, config.num_warps, config.num_stages)


def launch_gist_compact_bwd(
    grad_gist_k: torch.Tensor, grad_gist_v: torch.Tensor, gather: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv ``[B, Hkv, num_local, D]`` from the gradients of the gathered compact rows alone."""
    shape = (*grad_gist_k.shape[:2], num_local, grad_gist_k.shape[3])
    dk, dv = (torch.zeros(shape, dtype=grad_gist_k.dtype, device=grad_gist_k.device) for _ in range(2))
    if grad_gist_k.numel() and num_local:
        launch = plan_gist_fold(dk, 0, gather.shape[1], 1)
        launch(dk.device, strided(grad_gist_k, grad_gist_v), gather, (dk, dv), (dk, dv))
    return dk, dv
