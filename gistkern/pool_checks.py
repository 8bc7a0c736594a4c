"""What `gistkern.pool` asks of its arguments: shapes, types and devices; values only where they are on the CPU."""

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
    if batch == 0 or heads == 0:
        raise ValueError(f"q has {batch} sequences of {heads} heads: there is nothing to attend")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"gist_decode takes float16, bfloat16 or float32 queries, got {q.dtype}")
    _refuse_gradients("gist_decode", q, *gist.tensors(), *tail.tensors())
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
    tail_rows = shape[2] if page_table is None else page_table.shape[1] * shape[1]
    if tail_rows < rows:
        raise ValueError(f"the tail has room for {tail_rows} rows, fewer than the {rows} new ones, which stand in it")
    _check_devices(q, *gist.tensors(), *tail.tensors(), *vectors.values(), tail_length, page_table)
    if _readable(q):
        _check_decode_values(gist, tail, tail_rows, gist_begin, gist_end, tail_length, local_begin, page_table)
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
    _refuse_gradients("gist_compact", k, v, *pool.tensors())
    if pool.key.dim() != 3 or pool.key.shape[1:] != (k.shape[1], k.shape[3]):
        raise ValueError(f"the pool must be [rows, {k.shape[1]}, {k.shape[3]}], got {tuple(pool.key.shape)}")
    if not pool.quantised and pool.key.dtype != k.dtype:
        raise ValueError(f"the pool is {pool.key.dtype}, k {k.dtype}: make them equal, or quantise the pool")
    for name, one, twin in (("key", pool.key, pool.value), ("key_scale", pool.key_scale, pool.value_scale)):
        if one is not None and twin is not None and one.stride() != twin.stride():
            raise ValueError(f"keys and values of a pool lie alike in memory, but {name} has strides {one.stride()}")
    if pool.key.stride(2) != 1:
        raise ValueError(f"the pool's rows must be contiguous, got strides {pool.key.stride()}")
    _check_devices(k, v, gather, slot, *pool.tensors())
    if _readable(k):
        _check_rows("gather", gather, k.shape[2], "k and v")
        _check_rows("slot", slot, len(pool.key), "the pool")


def _readable(tensor: torch.Tensor) -> bool:
    # on a GPU reading waits for the device, while compiling there is nothing to read
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_decode_values(
    gist: KeyValueRows,
    tail: KeyValueRows,
    tail_rows: int,
    gist_begin: torch.Tensor,
    gist_end: torch.Tensor,
    tail_length: torch.Tensor | None,
    local_begin: torch.Tensor | None,
    page_table: torch.Tensor | None,
) -> None:
    pool_rows = len(gist.key)
    if bool(((gist_begin < gist_end) & ((gist_begin < 0) | (gist_end > pool_rows))).any()):
        raise ValueError(f"gist_begin and gist_end must lie in 0..{pool_rows}, the rows of the pool")
    if tail_length is not None and bool(((tail_length < 0) | (tail_length > tail_rows)).any()):
        raise ValueError(f"tail_length must lie in 0..{tail_rows}, the rows that the tail has room for")
    if local_begin is not None and bool((local_begin < 0).any()):
        raise ValueError("local_begin must not be negative")
    if page_table is not None:
        pages, size = tail.key.shape[:2]
        length = torch.full((len(page_table),), tail_rows) if tail_length is None else tail_length
        used = torch.arange(page_table.shape[1]) * size < length[:, None]
        if bool((used & ((page_table < 0) | (page_table >= pages))).any()):
            raise ValueError(f"page_table must name pages 0..{pages - 1} wherever a sequence has rows")


def _check_rows(name: str, index: torch.Tensor, rows: int, of: str) -> None:
    if bool(((index < -1) | (index >= rows)).any()):
        raise ValueError(f"{name} must list rows 0..{rows - 1} of {of}, or -1")


def _refuse_gradients(what: str, *tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{what} has no gradient: call it under torch.no_grad(), or use gist_attention")


def _check_devices(first: torch.Tensor, *others: torch.Tensor | None) -> None:
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"tensors are on {first.device} and {tensor.device}: use one device")
