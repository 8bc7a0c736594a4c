"""Compaction: fill the compact rows from this call's K and V in one launch, and its gradient without atomics."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gistkern.kernels.arguments import strided
from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, guard
from gistkern.kernels.primitives import head_rows, load_rows, matmul, store_rows
from gistkern.kernels.schedule import padded

__all__ = ["gist_compact_bwd_kernel", "gist_compact_kernel", "launch_gist_compact", "launch_gist_compact_bwd"]


class CopyMeta(NamedTuple):
    """The compile-time constants of these kernels: tiles of `BG` rows by `BD` columns, of `HEADS` K/V heads of `D`."""

    HEADS: int
    D: int
    BD: int
    BG: int


@triton.jit(do_not_specialize=["n_past", "n_compact"])
def gist_compact_kernel(buffers, gather_ptr, results, n_past, n_compact, META: tl.constexpr):
    """gist_k, gist_v ``[B, HEADS, n_compact, D]`` (results, contiguous): the past rows, then those that gather lists.

    buffers: k v ``[B, HEADS, M, D]`` and past_k past_v ``[B, HEADS, n_past, D]``, `strided`, with D contiguous; gather:
    int64 ``[B, n_compact - n_past]``, local rows, -1 for a filler (zeros). Copies bits: whatever was applied to
    the keys before, rotation included, stays.
    """
    n_tiles = tl.cdiv(n_compact, META.BG)
    i_bh = tl.program_id(0) // n_tiles
    i_b = (i_bh // META.HEADS).to(tl.int64)
    i_kv = (i_bh % META.HEADS).to(tl.int64)
    o_compact = tl.program_id(0) % n_tiles * META.BG + tl.arange(0, META.BG)
    m_compact = o_compact < n_compact
    is_past = o_compact < n_past
    p_gather = gather_ptr + i_b * (n_compact - n_past) + (o_compact - n_past)
    o_local = tl.load(p_gather, mask=m_compact & ~is_past, other=-1)
    o_past = o_compact.to(tl.int64)
    m_past = m_compact & is_past
    m_local = m_compact & (o_local >= 0)
    p_out = (i_bh.to(tl.int64) * n_compact + o_compact) * META.D
    for i in tl.static_range(2):  # keys, values
        p_past = head_rows(buffers[i + 2], i_b, i_kv, o_past)
        p_local = head_rows(buffers[i], i_b, i_kv, o_local)
        # two loads of which one is masked off: a lane that is masked costs no traffic
        b_past = load_rows(p_past, m_past, META.D, META.BD)
        b_local = load_rows(p_local, m_local, META.D, META.BD)
        b_rows = tl.where(is_past[:, None], b_past, b_local)
        store_rows(results[i] + p_out, b_rows, m_compact, META.D, META.BD)


@triton.jit(do_not_specialize=["n_gathered", "n_local_rows"])
def gist_compact_bwd_kernel(grads, gather_ptr, results, n_gathered, n_local_rows, META: tl.constexpr):
    """dk, dv ``[B, HEADS, M, D]`` (results, contiguous, zeroed by the caller): the gathered rows' gradients, put back.

    grads: grad_gist_k, grad_gist_v, `strided`, from the first gathered row on. A token listed several times is written
    by the program of its first entry only, which adds the later entries to it in order.
    """
    gk, gv = grads
    n_tiles = tl.cdiv(n_gathered, META.BG)
    i_bh = tl.program_id(0) // n_tiles
    i_b = (i_bh // META.HEADS).to(tl.int64)
    i_kv = (i_bh % META.HEADS).to(tl.int64)
    gather_ptr += i_b * n_gathered
    o_mine = tl.program_id(0) % n_tiles * META.BG + tl.arange(0, META.BG)
    o_local = tl.load(gather_ptr + o_mine, mask=o_mine < n_gathered, other=-1)
    m_mine = o_local >= 0
    n_earlier = tl.full([META.BG], 0, tl.int32)
    b_dk = load_rows(head_rows(gk, i_b, i_kv, o_mine.to(tl.int64)), m_mine, META.D, META.BD).to(tl.float32)
    b_dv = load_rows(head_rows(gv, i_b, i_kv, o_mine.to(tl.int64)), m_mine, META.D, META.BD).to(tl.float32)
    for i_entry in range(0, n_gathered, META.BG):
        o_entry = i_entry + tl.arange(0, META.BG)
        m_entry = o_entry < n_gathered
        o_other = tl.load(gather_ptr + o_entry, mask=m_entry, other=-2)
        m_same = (o_local[:, None] == o_other[None, :]) & m_mine[:, None]  # [BG, BG]
        m_same = m_same & (o_entry[None, :] != o_mine[:, None])
        n_earlier += tl.sum((m_same & (o_entry[None, :] < o_mine[:, None])).to(tl.int32), 1)
        # repeats are rare (attention sinks); a product with 0 and 1 would spread an infinity to the whole tile
        if tl.max(tl.sum(m_same.to(tl.int32), 1), 0) > 0:
            o_entry64 = o_entry.to(tl.int64)
            b_gk = load_rows(head_rows(gk, i_b, i_kv, o_entry64), m_entry, META.D, META.BD)
            b_gv = load_rows(head_rows(gv, i_b, i_kv, o_entry64), m_entry, META.D, META.BD)
            b_same = m_same.to(tl.float32).to(b_gk.dtype)
            b_dk += matmul(b_same, b_gk, "ieee")
            b_dv += matmul(b_same, b_gv, "ieee")
    m_write = m_mine & (n_earlier == 0)
    p_out = (i_bh.to(tl.int64) * n_local_rows + o_local) * META.D
    store_rows(results[0] + p_out, b_dk.to(results[0].dtype.element_ty), m_write, META.D, META.BD)
    store_rows(results[1] + p_out, b_dv.to(results[1].dtype.element_ty), m_write, META.D, META.BD)


def launch_gist_compact(
    k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compact rows of K and V, ``[B, Hkv, past + G, D]`` each; arguments as `gistkern.rows`."""
    past = 0 if past_k is None else past_k.shape[2]
    shape = (*k.shape[:2], past + gather.shape[1], k.shape[3])
    results = torch.empty(shape, dtype=k.dtype, device=k.device), torch.empty(shape, dtype=k.dtype, device=k.device)
    buffers = k, v, k if past_k is None else past_k, v if past_v is None else past_v
    _launch(gist_compact_kernel, buffers, gather, results, (past, shape[2]), shape[2])
    return results


def launch_gist_compact_bwd(
    grad_gist_k: torch.Tensor, grad_gist_v: torch.Tensor, gather: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv ``[B, Hkv, num_local, D]`` from the gradients of the gathered compact rows."""
    shape = (*grad_gist_k.shape[:2], num_local, grad_gist_k.shape[3])
    dk, dv = (torch.zeros(shape, dtype=grad_gist_k.dtype, device=grad_gist_k.device) for _ in range(2))
    _launch(
        gist_compact_bwd_kernel,
        (grad_gist_k, grad_gist_v),
        gather,
        (dk, dv),
        (gather.shape[1], num_local),
        gather.shape[1],
    )
    return dk, dv


def _launch(kernel, buffers, gather: torch.Tensor, results, counts: tuple[int, int], entries: int) -> None:
    """One program for each head and tile of `entries`; nothing where there are none."""
    batch, heads, _, dim = results[0].shape
    if batch * heads * entries * dim == 0:
        return
    width, device = padded(dim), gather.device
    config = pick("compact", facts_of(device).arch, width, results[0].element_size())
    with guard(device):
        kernel[(triton.cdiv(entries, config.block_rows) * batch * heads,)](
            *(strided(*buffers), gather, results, *counts),
            META=CopyMeta(heads, dim, width, config.block_rows),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
