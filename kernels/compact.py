"""Compaction: fill the compact rows from this call's K and V in one launch, and its gradient without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gistkern.kernels.configs import pick
from gistkern.kernels.device import facts_of, guard
from gistkern.kernels.primitives import load_rows, matmul, store_rows
from gistkern.kernels.schedule import padded

__all__ = ["gist_compact_bwd_kernel", "gist_compact_kernel", "launch_gist_compact", "launch_gist_compact_bwd"]


@triton.jit(do_not_specialize=["n_past", "n_compact"])
def gist_compact_kernel(
    k_ptr,
    v_ptr,
    past_k_ptr,
    past_v_ptr,
    gather_ptr,
    out_k_ptr,
    out_v_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pkb,
    stride_pkh,
    stride_pkn,
    stride_pvb,
    stride_pvh,
    stride_pvn,
    n_past,
    n_compact,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BG: tl.constexpr,
):
    """out_k, out_v ``[B, KV_HEADS, n_compact, D]`` (contiguous): the past rows, then the rows that gather lists.

    k v ``[B, KV_HEADS, M, D]`` and past_k past_v ``[B, KV_HEADS, n_past, D]`` by strides with D contiguous; gather
    int64 ``[B, n_compact - n_past]``, local rows, -1 for a filler (zeros). Copies bits: whatever was applied to
    the keys before, rotation included, stays.
    """
    n_tiles = tl.cdiv(n_compact, BG)
    i_bh = tl.program_id(0) // n_tiles
    i_b = (i_bh // KV_HEADS).to(tl.int64)
    i_kv = (i_bh % KV_HEADS).to(tl.int64)
    o_compact = tl.program_id(0) % n_tiles * BG + tl.arange(0, BG)
    m_compact = o_compact < n_compact
    is_past = o_compact < n_past
    p_gather = gather_ptr + i_b * (n_compact - n_past) + (o_compact - n_past)
    o_local = tl.load(p_gather, mask=m_compact & ~is_past, other=-1)
    o_past = o_compact.to(tl.int64)
    m_past = m_compact & is_past
    m_local = m_compact & (o_local >= 0)
    p_pk = past_k_ptr + i_b * stride_pkb + i_kv * stride_pkh + o_past * stride_pkn
    p_pv = past_v_ptr + i_b * stride_pvb + i_kv * stride_pvh + o_past * stride_pvn
    p_k = k_ptr + i_b * stride_kb + i_kv * stride_kh + o_local * stride_kn
    p_v = v_ptr + i_b * stride_vb + i_kv * stride_vh + o_local * stride_vn
    # two loads of which one is masked off: a lane that is masked costs no traffic
    b_k = tl.where(is_past[:, None], load_rows(p_pk, m_past, D, BD), load_rows(p_k, m_local, D, BD))
    p_out = (i_bh.to(tl.int64) * n_compact + o_compact) * D
    store_rows(out_k_ptr + p_out, b_k, m_compact, D, BD)
    b_v = tl.where(is_past[:, None], load_rows(p_pv, m_past, D, BD), load_rows(p_v, m_local, D, BD))
    store_rows(out_v_ptr + p_out, b_v, m_compact, D, BD)


@triton.jit(do_not_specialize=["n_gathered", "n_local_rows"])
def gist_compact_bwd_kernel(
    grad_gist_k_ptr,
    grad_gist_v_ptr,
    gather_ptr,
    dk_ptr,
    dv_ptr,
    stride_gkb,
    stride_gkh,
    stride_gkn,
    stride_gvb,
    stride_gvh,
    stride_gvn,
    n_gathered,
    n_local_rows,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BG: tl.constexpr,
):
    """dk, dv ``[B, KV_HEADS, M, D]`` (contiguous, zeroed by the caller): the gathered rows' gradients, put back.

    grad_gist_k, grad_gist_v point at the first gathered row. A token listed several times is written by the
    program of its first entry only, which adds the later entries to it in order.
    """
    n_tiles = tl.cdiv(n_gathered, BG)
    i_bh = tl.program_id(0) // n_tiles
    i_b = (i_bh // KV_HEADS).to(tl.int64)
    i_kv = (i_bh % KV_HEADS).to(tl.int64)
    gather_ptr += i_b * n_gathered
    p_gk = grad_gist_k_ptr + i_b * stride_gkb + i_kv * stride_gkh
    p_gv = grad_gist_v_ptr + i_b * stride_gvb + i_kv * stride_gvh
    o_mine = tl.program_id(0) % n_tiles * BG + tl.arange(0, BG)
    o_local = tl.load(gather_ptr + o_mine, mask=o_mine < n_gathered, other=-1)
    m_mine = o_local >= 0
    n_earlier = tl.zeros([BG], tl.int32)
    b_dk = load_rows(p_gk + o_mine.to(tl.int64) * stride_gkn, m_mine, D, BD).to(tl.float32)
    b_dv = load_rows(p_gv + o_mine.to(tl.int64) * stride_gvn, m_mine, D, BD).to(tl.float32)
    for i_entry in range(0, n_gathered, BG):
        o_entry = i_entry + tl.arange(0, BG)
        m_entry = o_entry < n_gathered
        o_other = tl.load(gather_ptr + o_entry, mask=m_entry, other=-2)
        m_same = (o_local[:, None] == o_other[None, :]) & m_mine[:, None]  # [BG, BG]
        m_same = m_same & (o_entry[None, :] != o_mine[:, None])
        n_earlier += tl.sum((m_same & (o_entry[None, :] < o_mine[:, None])).to(tl.int32), 1)
        # repeats are rare (attention sinks); a product with 0 and 1 would spread an infinity to the whole tile
        if tl.max(tl.sum(m_same.to(tl.int32), 1), 0) > 0:
            o_entry64 = o_entry.to(tl.int64)
            b_gk = load_rows(p_gk + o_entry64 * stride_gkn, m_entry, D, BD)
            b_gv = load_rows(p_gv + o_entry64 * stride_gvn, m_entry, D, BD)
            b_same = m_same.to(tl.float32).to(b_gk.dtype)
            b_dk += matmul(b_same, b_gk, "ieee")
            b_dv += matmul(b_same, b_gv, "ieee")
    m_write = m_mine & (n_earlier == 0)
    p_out = (i_bh.to(tl.int64) * n_local_rows + o_local) * D
    store_rows(dk_ptr + p_out, b_dk.to(dk_ptr.dtype.element_ty), m_write, D, BD)
    store_rows(dv_ptr + p_out, b_dv.to(dv_ptr.dtype.element_ty), m_write, D, BD)


def launch_gist_compact(
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    gather: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compact rows of K and V, ``[B, Hkv, past + G, D]`` each; arguments as `gistkern.rows`."""
    batch, heads, _, dim = k.shape
    past = 0 if past_k is None else past_k.shape[2]
    compact = past + gather.shape[1]
    out_k, out_v = (torch.empty((batch, heads, compact, dim), dtype=k.dtype, device=k.device) for _ in range(2))
    if out_k.numel() == 0:
        return out_k, out_v
    width = padded(dim)
    config = pick("compact", facts_of(k.device).arch, width, k.element_size())
    past_k, past_v = k if past_k is None else past_k, v if past_v is None else past_v
    with guard(k.device):
        gist_compact_kernel[(triton.cdiv(compact, config.block_rows) * batch * heads,)](
            k,
            v,
            past_k,
            past_v,
            gather,
            out_k,
            out_v,
            *k.stride()[:3],
            *v.stride()[:3],
            *past_k.stride()[:3],
            *past_v.stride()[:3],
            past,
            compact,
            KV_HEADS=heads,
            D=dim,
            BD=width,
            BG=config.block_rows,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out_k, out_v


def launch_gist_compact_bwd(
    grad_gist_k: torch.Tensor, grad_gist_v: torch.Tensor, gather: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv ``[B, Hkv, num_local, D]`` from the gradients of the gathered compact rows."""
    batch, heads, gathered, dim = grad_gist_k.shape
    shape = (batch, heads, num_local, dim)
    dk, dv = (torch.zeros(shape, dtype=grad_gist_k.dtype, device=grad_gist_k.device) for _ in range(2))
    if grad_gist_k.numel() == 0:
        return dk, dv
    width = padded(dim)
    config = pick("compact", facts_of(dk.device).arch, width, dk.element_size())
    with guard(dk.device):
        gist_compact_bwd_kernel[(triton.cdiv(gathered, config.block_rows) * batch * heads,)](
            grad_gist_k,
            grad_gist_v,
            gather,
            dk,
            dv,
            *grad_gist_k.stride()[:3],
            *grad_gist_v.stride()[:3],
            gathered,
            num_local,
            KV_HEADS=heads,
            D=dim,
            BD=width,
            BG=config.block_rows,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dk, dv
