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

__all__ = ["CopyMeta", "gist_compact_kernel", "launch_gist_compact", "launch_gist_compact_into", "plan_gist_compact"]


class CopyMeta(NamedTuple):
    """Compile-time constants of kernels that copy rows of `HEADS` K/V heads of `D`: tiles of `BG` rows, `BD` wide."""

    HEADS: int
    D: int
    BD: int
    BG: int


@triton.jit(do_not_specialize=["n_past", "n_compact", "n_first"])
def gist_compact_kernel(buffers, gather_ptr, results, n_past, n_compact, n_first, META: tl.constexpr):
    """Rows ``[n_first, n_compact)`` of gist_k, gist_v (results): the past rows, then those that gather lists.

    buffers: k v ``[B, HEADS, M, D]`` and past_k past_v ``[B, HEADS, n_past, D]``; results ``[B, HEADS, n_compact, D]``;
    all `strided`, with D contiguous; gather: int64 ``[B, n_compact - n_past]``, local rows, -1 for a filler (zeros).
    n_first: 0, or n_past where the results hold the past rows already. Copies bits: whatever was applied to the keys
    before, rotation included, stays.
    """
    n_tiles = tl.cdiv(n_compact - n_first, META.BG)
    i_bh = tl.program_id(0) // n_tiles
    i_b = (i_bh // META.HEADS).to(tl.int64)
    i_kv = (i_bh % META.HEADS).to(tl.int64)
    o_compact = n_first + tl.program_id(0) % n_tiles * META.BG + tl.arange(0, META.BG)
    m_compact = o_compact < n_compact
    is_past = o_compact < n_past
    p_gather = gather_ptr + i_b * (n_compact - n_past) + (o_compact - n_past)
    o_local = tl.load(p_gather, mask=m_compact & ~is_past, other=-1)
    o_past = o_compact.to(tl.int64)
    m_past = m_compact & is_past
    m_local = m_compact & (o_local >= 0)
    for i in tl.static_range(2):  # keys, values
        p_past = head_rows(buffers[i + 2], i_b, i_kv, o_past)
        p_local = head_rows(buffers[i], i_b, i_kv, o_local)
        # two loads of which one is masked off: a lane that is masked costs no traffic
        b_past = load_rows(p_past, m_past, META.D, META.BD)
        b_local = load_rows(p_local, m_local, META.D, META.BD)
        b_rows = tl.where(is_past[:, None], b_past, b_local)
        p_out = head_rows(results[i], i_b, i_kv, o_compact.to(tl.int64))
        store_rows(p_out, b_rows, m_compact, META.D, META.BD)


def plan_gist_compact(like: torch.Tensor, n_past: int, n_compact: int, n_first: int = 0) -> Launch:
    """The launch for compact rows of k and v like `like` ``[B, Hkv, M, D]``; buffers and n_first as of the kernel."""
    batch, heads, _, dim = like.shape
    width = padded(dim)
    config = pick("compact", facts_of(like.device).arch, width, like.element_size())
    programs = triton.cdiv(n_compact - n_first, config.block_rows) * batch * heads
    constants = {"META": CopyMeta(heads, dim, width, config.block_rows)}
    numbers = n_past, n_compact, n_first
    return Launch(gist_compact_kernel, programs, numbers, constants, config.num_warps, config.num_stages)


def launch_gist_compact(
    k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compact rows of K and V, ``[B, Hkv, past + G, D]`` each; arguments as `gistkern.rows`."""
    past = 0 if past_k is None else past_k.shape[2]
    shape = (*k.shape[:2], past + gather.shape[1], k.shape[3])
    results = torch.empty(shape, dtype=k.dtype, device=k.device), torch.empty(shape, dtype=k.dtype, device=k.device)
    if results[0].numel():
        buffers = k, v, k if past_k is None else past_k, v if past_v is None else past_v
        plan_gist_compact(k, past, shape[2])(k.device, strided(*buffers), gather, strided(*results))
    return results


def launch_gist_compact_into(
    k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor
) -> None:
    """The rows of K and V that `gather` lists, written to `out_k` and `out_v` ``[B, Hkv, G, D]``."""
    if out_k.numel():
        results = strided(out_k, out_v)
        plan_gist_compact(k, 0, gather.shape[1])(k.device, strided(k, v, k, v), gather, results)
