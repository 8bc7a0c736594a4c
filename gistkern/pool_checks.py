"""What `gistkern.pool` asks of its arguments: shapes, types and devices, never values (which may be on a GPU)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gistkern.kernels.schedule import DECODE_ROWS

if TYPE_CHECKING:
    from gistkern.pool import KeyValueRows

__all__ = ["check_compact", "check_decode", "per_row"]


def per_row(vector: torch.Tensor, rows: int) -> torch.Tensor:
    """int32 ``[B, N]`` of a vector ``[B]`` or ``[B, N]``, without copying."""
    return vector if vector.dim() == 2 else vector[:, None].expand(-1, rows)


def check_decode(
    q: torch.Tensor,
    gist: KeyValueRows,
    tail: KeyValueRows,
    gist_begin: torch.Tensor,
    gist_end: torch.Tensor,
    tail_length: torch.Tensor | None,
    local_begin: torch.Tensor | None,
    page_table: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of `gist_decode` fit each other."""
    if q.dim() != 4 or not 1 <= q.shape[2] <= DECODE_ROWS:
        raise ValueError(f"q must be [batch, heads, 1..{DECODE_ROWS} rows, head_dim], got {tuple(q.shape)}")
    batch, heads, rows, dim = q.shape
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("gist_decode has no gradient: call it under torch.no_grad(), or use gist_attention")
    if gist.key.dim() != 3 or gist.key.shape[2] != dim:
        raise ValueError(f"gist must be a pool [rows, kv_heads, {dim}], got {tuple(gist.key.shape)}")
    kv_heads = gist.key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads ({heads}) must be a multiple of the pool's key/value heads ({kv_heads})")
    shape = tuple(tail.key.shape)
    if page_table is None and (len(shape) != 4 or shape[:2] != (batch, kv_heads) or shape[3] != dim):
        raise ValueError(f"tail must be [{batch}, {kv_heads}, rows, {dim}] without a page table, got {shape}")
    if page_table is not None and (len(shape) != 4 or shape[2:] != (kv_heads, dim) or shape[1] == 0):
        raise ValueError(f"tail must be pages [pages, page_size, {kv_heads}, {dim}], got {shape}")
    vectors = {"gist_begin": gist_begin, "gist_end": gist_end, "local_begin": local_begin}
    for name, vector in vectors.items():
        if vector is not None and (vector.dtype != torch.int32 or tuple(vector.shape) not in {(batch,), (batch, rows)}):
            raise ValueError(
                f"{name} must be torch.int32 of shape ({batch},) or ({batch}, {rows}), "
                f"got {vector.dtype} of shape {tuple(vector.shape)}"
            )
    if tail_length is not None and (tail_length.dtype != torch.int32 or tuple(tail_length.shape) != (batch,)):
        raise ValueError(
            f"tail_length must be torch.int32 of shape ({batch},), "
            f"got {tail_length.dtype} of shape {tuple(tail_length.shape)}"
        )
    if page_table is not None and (
        page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != batch
    ):
        raise ValueError(
            f"page_table must be torch.int32 of shape ({batch}, pages), "
            f"got {page_table.dtype} of shape {tuple(page_table.shape)}"
        )
    _check_devices(q, *gist.tensors(), *tail.tensors(), *vectors.values(), tail_length, page_table)
    for name, buffer in (("gist", gist), ("tail", tail)):
        if not buffer.quantised and buffer.key.dtype != q.dtype:
            raise ValueError(f"{name} is {buffer.key.dtype}, q {q.dtype}: make them equal, or quantise the rows")


def check_compact(
    k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, slot: torch.Tensor, pool: KeyValueRows
) -> None:
    """Raise ValueError unless the arguments of `gist_compact` fit each other."""
    if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(
            f"k and v must be alike, [batch, kv_heads, rows, head_dim], got {tuple(k.shape)} {k.dtype} "
            f"and {tuple(v.shape)} {v.dtype}"
        )
    for name, index in (("gather", gather), ("slot", slot)):
        if index.dtype != torch.int64 or index.dim() != 2 or len(index) != len(k) or index.shape != gather.shape:
            raise ValueError(
                f"{name} must be torch.int64 [{len(k)}, rows], gather and slot of one shape, "
                f"got {index.dtype} of shape {tuple(index.shape)}"
            )
    if pool.key.dim() != 3 or pool.key.shape[1:] != (k.shape[1], k.shape[3]):
        raise ValueError(f"the pool must be [rows, {k.shape[1]}, {k.shape[3]}], got {tuple(pool.key.shape)}")
    if not pool.quantised and pool.key.dtype != k.dtype:
        raise ValueError(f"the pool is {pool.key.dtype}, k {k.dtype}: make them equal, or quantise the pool")
    _check_devices(k, v, gather, slot, *pool.tensors())


def _check_devices(first: torch.Tensor, *others: torch.Tensor | None) -> None:
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"tensors are on {first.device} and {tensor.device}: use one device")
