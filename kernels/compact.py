"""Compaction: fill the compact rows from this call's K and V in one launch (its gradient: fold.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gistkern.kernels.arguments import strided
from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of
from gistkern.kernels.launch import Launch
from gistkern.kernels.primitives import head_rows, load_rows, store_rows
from gistkern.kernels.schedule import padded

__all__ = ["CopyMeta", "gist_compact_kernel", "launch_gist_compact", "plan_gist_compact"]


class CopyMeta(NamedTuple):
    """Compile-time constants of kernels that copy rows of `HEADS` K/V heads of `D`: tiles of `BG` rows, `BD` wide."""

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


def plan_gist_compact(like: torch.Tensor, n_past: int, n_compact: int) -> Launch:
    """The launch for compact rows of k and v like `like` ``[B, Hkv, M, D]``; buffers as the kernel takes them."""
    batch, heads, _, dim = like.shape
    width = padded(dim)
    config = pick("compact", facts_of(like.device).arch, width, like.element_size())
    programs = triton.cdiv(n_compact, config.block_rows) * batch * heads
    meta = CopyMeta(heads, dim, width, config.block_rows)
    return Launch(
        gist_compact_kernel, programs, (n_past, n_compact), {"META": meta}, config.num_warps, config.num_stages
    )


def launch_gist_compact(
    k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compact rows of K and V, ``[B, Hkv, past + G, D]`` each; arguments as `gistkern.rows`."""
    past = 0 if past_k is None else past_k.shape[2]
    shape = (*k.shape[:2], past + gather.shape[1], k.shape[3])
    results = torch.empty(shape, dtype=k.dtype, device=k.device), torch.empty(shape, dtype=k.dtype, device=k.device)
    if results[0].numel():
        buffers = k, v, k if past_k is None else past_k, v if past_v is None else past_v
        plan_gist_compact(k, past, shape[2])(k.device, strided(*buffers), gather, results)
    return results
