"""What `gistkern.ops.decode` asks of its arguments: shapes, types and devices, at once; values when its operators run
(`decode_library`), compiled or not, and only where they are on the CPU: a GPU would have to be waited for."""

from __future__ import annotations

import numpy as np
import torch

from gistkern.kernels.arguments import DecodeArguments
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.ops.checks import check_devices, refuse_forward_mode
from gistkern.rows import KeyValueRows

__all__ = [
    "check_apart",
    "check_compact",
    "check_compact_values",
    "check_decode",
    "check_decode_values",
    "per_row",
    "refuse_gradients",
]


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
    """Raise ValueError unless the arguments of `gist_decode` fit each other, their values left out."""
    if q.dim() != 4 or not 1 <= q.shape[2] <= DECODE_ROWS:
        raise ValueError(f"q must be [batch, heads, 1..{DECODE_ROWS} rows, head_dim], got {tuple(q.shape)}")
    batch, heads, rows, dim = q.shape
    if batch == 0 or heads == 0 or dim == 0:
        raise ValueError(f"q has {batch} sequences of {heads} heads of {dim} elements: there is nothing to attend")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"gist_decode takes float16, bfloat16 or float32 queries, got {q.dtype}")
    refuse_gradients("gist_decode", q, *gist.tensors(), *tail.tensors())
    if gist.key.dim() != 3 or gist.key.shape[2] != dim:
        raise ValueError(f"gist must be a pool [rows, kv_heads, {dim}], got {tuple(gist.key.shape)}")
    kv_heads = gist.key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads ({heads}) must be a multiple of the pool's key/value heads ({kv_heads})")
    shape = tuple(tail.key.shape)
    if page_table is None and (len(shape) != 4 or shape[:2] != (batch, kv_heads) or shape[3] != dim):
        raise ValueError(f"tail must be [{batch}, {kv_heads}, rows, {dim}] without a page table, got {shape}")
    if page_table is not None and (len(shape) != 4 or shape[2:] != (kv_heads, dim) or 0 in shape[:2]):
        raise ValueError(f"tail must be pages [pages, page_size, {kv_heads}, {dim}], got {shape}")
    vectors = {"gist_begin": gist_begin, "gist_end": gist_end, "local_begin": local_begin}
    optional = {"tail_length": tail_length, "page_table": page_table}
    for name, vector in {**vectors, **optional}.items():
        if not torch.is_tensor(vector) and (vector is not None or name in ("gist_begin", "gist_end")):
            raise TypeError(f"{name} must be a tensor, got {type(vector).__name__}")
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
    if max(tail_rows, len(gist.key)) >= 2**31:
        raise ValueError(f"pool and tail have fewer than 2^31 rows, got {len(gist.key)} and {tail_rows}")
    check_devices(q, *gist.tensors(), *tail.tensors(), *vectors.values(), tail_length, page_table)
    for name, buffer in (("gist", gist), ("tail", tail)):
        if not buffer.quantized and buffer.key.dtype != q.dtype:
            raise ValueError(f"{name} is {buffer.key.dtype}, q {q.dtype}: make them equal, or quantize the rows")


def check_compact(
    k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, slot: torch.Tensor, pool: KeyValueRows
) -> None:
    """Raise ValueError unless the arguments of `gist_compact` fit each other, their values left out."""
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
    refuse_gradients("gist_compact", k, v, *pool.tensors())
    if pool.key.dim() != 3 or pool.key.shape[1:] != (k.shape[1], k.shape[3]) or not pool.key.shape[1]:
        raise ValueError(f"the pool must be [rows, {k.shape[1]}, {k.shape[3]}], got {tuple(pool.key.shape)}")
    if not pool.quantized and pool.key.dtype != k.dtype:
        raise ValueError(f"the pool is {pool.key.dtype}, k {k.dtype}: make them equal, or quantize the pool")
    check_apart(pool)
    if pool.key.stride(2) != 1 and pool.key.shape[2] > 1:
        raise ValueError(f"the pool's rows must be contiguous, got strides {pool.key.stride()}")
    check_devices(k, v, gather, slot, *pool.tensors())


def check_apart(pool: KeyValueRows) -> None:
    """Raise ValueError unless keys and values of a pool that is written lie alike, and no element is two of them."""
    for name, one, twin in (("key", pool.key, pool.value), ("key_scale", pool.key_scale, pool.value_scale)):
        if one is None or twin is None:
            continue
        if one.stride() != twin.stride():
            raise ValueError(f"keys and values of a pool lie alike in memory, but {name} has strides {one.stride()}")
        # while compiling there are no addresses; the operator asks again when it runs
        if not torch.compiler.is_compiling() and one.numel() and _share_memory(one, twin):
            raise ValueError(f"keys and values of a pool lie apart in memory, but parts of {name} are both")
        if any(size > 1 and stride == 0 for size, stride in zip(one.shape, one.stride(), strict=True)):
            raise ValueError(f"a pool is written, but rows of {name} share memory: strides {one.stride()}")


def _share_memory(one: torch.Tensor, twin: torch.Tensor) -> bool:
    """Whether an element of one is an element of the other; they have one shape and the same strides."""
    axes = sorted(((stride, size) for stride, size in zip(one.stride(), one.shape, strict=True) if size > 1))

    def reached(distance: int, axes: list[tuple[int, int]]) -> bool:  # by steps along the axes, forth and back
        if not axes:
            return distance == 0
        *inner, (stride, size) = axes
        if stride == 0:
            return reached(distance, inner)
        steps = distance // stride
        return any(reached(abs(distance - n * stride), inner) for n in (steps, steps + 1) if n < size)

    distance, rest = divmod(abs(one.data_ptr() - twin.data_ptr()), one.itemsize)
    return rest == 0 and reached(distance, axes)


def check_decode_values(call: DecodeArguments) -> None:
    """Raise ValueError where a row, length or page is none of its buffer's. Tensors on the CPU."""
    tail_k, page_table, local_begin = call.tail_k, call.page_table, call.local_begin
    pool_rows = len(call.gist_k)
    begin, end = call.gist_begin.numpy().astype(np.int64), call.gist_end.numpy().astype(np.int64)
    seen = begin < end
    if (seen & ((begin < 0) | (end > pool_rows))).any():
        raise ValueError(f"gist_begin and gist_end must lie in 0..{pool_rows}, the rows of the pool")
    hull = np.where(seen, end, 0).max(1) - np.where(seen, begin, pool_rows).min(1)
    if hull.max() > call.gist_capacity:
        raise ValueError(f"gist_capacity is {call.gist_capacity}, but a sequence sees {hull.max()} rows of the pool")
    tail_rows = tail_k.shape[2] if page_table is None else page_table.shape[1] * tail_k.shape[1]
    length = np.full(len(begin), tail_rows) if call.tail_length is None else call.tail_length.numpy()
    if ((length < 0) | (length > tail_rows)).any():
        raise ValueError(f"tail_length must lie in 0..{tail_rows}, the rows that the tail has room for")
    if local_begin is not None and (local_begin.numpy() < 0).any():
        raise ValueError("local_begin must not be negative")
    if page_table is not None:
        pages, size = tail_k.shape[:2]
        used = np.arange(page_table.shape[1]) * size < length[:, None]
        named = page_table.numpy()
        if (used & ((named < 0) | (named >= pages))).any():
            raise ValueError(f"page_table must name pages 0..{pages - 1} wherever a sequence has rows")


def check_compact_values(gather: torch.Tensor, slot: torch.Tensor, local_rows: int, pool_rows: int) -> None:
    """Raise ValueError where a row is none of its buffer's, or is written twice. Tensors on the CPU."""
    source, target = gather.numpy(), slot.numpy()
    for name, index, rows, of in (("gather", source, local_rows, "k and v"), ("slot", target, pool_rows, "the pool")):
        if ((index < -1) | (index >= rows)).any():
            raise ValueError(f"{name} must list rows 0..{rows - 1} of {of}, or -1")
    written = np.sort(target[(source >= 0) & (target >= 0)])
    if (written[1:] == written[:-1]).any():
        raise ValueError("slot must name different rows of the pool: it names one twice")


def refuse_gradients(what: str, *tensors: torch.Tensor) -> None:
    """Raise where a gradient or a tangent of one of the tensors would be lost."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{what} has no gradient: call it under torch.no_grad(), or use gist_attention")
    refuse_forward_mode(*tensors)
