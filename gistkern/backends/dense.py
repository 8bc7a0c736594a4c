"""The pool and the paged tail gathered into dense buffers: how backends without kernels for them are called.

Sizes come from capacities, so nothing waits for the device. The copy costs what the kernels of csrc/ save.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gistkern.kernels.arguments import AttentionArguments, DecodeArguments, PoolWrite
from gistkern.rows import as_bytes, dequantize, quantize

__all__ = ["compact", "decode"]

Forward = Callable[[AttentionArguments], tuple[torch.Tensor, torch.Tensor]]


def decode(forward: Forward, arguments: DecodeArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """By a backend's `forward`."""
    q, gist_k, gist_v, gist_k_scale, gist_v_scale, gist_begin, gist_end, *rest, gist_capacity, scale = arguments
    tail_k, tail_v, tail_k_scale, tail_v_scale, tail_length, local_begin, page_table = rest
    rows = q.shape[2]
    # the rows of the hull of a sequence's intervals, from its first on
    seen = gist_begin < gist_end
    far = torch.iinfo(torch.int32).max
    first = torch.where(seen, gist_begin, far).amin(1)
    first = torch.where(first == far, 0, first)  # [B]
    begin = torch.where(seen, gist_begin - first[:, None], 0)
    end = torch.where(seen, gist_end - first[:, None], 0)
    column = torch.arange(gist_capacity, device=q.device)
    pool_row = first[:, None] + column  # [B, G]
    used = column < end.amax(1)[:, None]
    gist = [
        _taken(rows_, scales, torch.where(used, pool_row, 0).long(), used, q.dtype)
        for rows_, scales in ((gist_k, gist_k_scale), (gist_v, gist_v_scale))
    ]
    tail = [_tail(r, s, tail_length, page_table, q.dtype) for r, s in ((tail_k, tail_k_scale), (tail_v, tail_v_scale))]
    capacity = tail[0].shape[2]
    shift = torch.zeros_like(first) if tail_length is None else capacity - tail_length  # tails stand right-aligned
    # int64: local_begin may be any int32, and a row that sees no tail row says so with a large one
    start = shift[:, None] + (torch.zeros_like(begin) if local_begin is None else local_begin).long()
    index = torch.arange(capacity - rows, capacity, device=q.device)
    # a row that would see no tail row at all is empty there: local_begin is one beyond itself
    start = torch.minimum(torch.maximum(start, shift[:, None]), index + 1)
    vectors = [vector.to(torch.int32).contiguous() for vector in (begin, end, start)]
    return forward(AttentionArguments(q, *tail, *gist, *vectors, scale))


def _taken(
    pool: torch.Tensor, scale: torch.Tensor | None, index: torch.Tensor, used: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows ``[B, Hkv, G, D]`` of a pool ``[R, Hkv, D]``; zeros where not `used`."""
    rows = dequantize(as_bytes(lambda t: t[index], pool), None if scale is None else scale[index], dtype)
    return rows.masked_fill(~used[..., None, None], 0).transpose(1, 2)


def _tail(
    rows: torch.Tensor,
    scale: torch.Tensor | None,
    length: torch.Tensor | None,
    page_table: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``[B, Hkv, T, D]``, right-aligned: the last row of each sequence in the last place, zeros in front."""
    if page_table is None:
        wide = dequantize(rows, scale, dtype)
    else:
        pages = page_table.clamp(0, len(rows) - 1).long()
        taken = dequantize(
            as_bytes(lambda t: t[pages], rows), None if scale is None else scale[pages], dtype
        )  # [B, pages, size, Hkv, D]
        wide = taken.flatten(1, 2).transpose(1, 2)
    if length is None:
        return wide
    capacity = wide.shape[2]
    column = torch.arange(capacity, device=rows.device) - (capacity - length.long())[:, None]  # [B, T]
    index = column.clamp(min=0)[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[3])
    return wide.gather(2, index).masked_fill((column < 0)[:, None, :, None], 0)


def compact(arguments: PoolWrite) -> None:
    """Finding the fillers waits for the device."""
    k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale = arguments
    sample, entry = ((gather >= 0) & (slot >= 0)).nonzero(as_tuple=True)
    target = slot[sample, entry]
    for rows, pool, scales in ((k, pool_k, pool_k_scale), (v, pool_v, pool_v_scale)):
        taken = rows[sample, :, gather[sample, entry]]  # [n, Hkv, D]
        if scales is None:
            pool[target] = taken
        else:
            # the bytes: index_put has no float8 kernel
            elements, scales[target] = quantize(taken, pool.dtype)
            pool.view(torch.int8)[target] = elements.view(torch.int8)
