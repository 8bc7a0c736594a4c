"""CPU backend without the extension: flash-style blocks through torch's own flash kernel, merged by log-sum-exp.

Never a dense mask: the blocks of sdpa_plan.py follow the two intervals. 16-bit inputs are computed in fp32.
The merge of partial results and its backward are in docs/concepts/numerics.md, "Merging partial attention".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gistkern.backends.sdpa_plan import Block, plan
from gistkern.kernels.arguments import AttentionArguments
from gistkern.rows import compact, compact_backward, compact_into

__all__ = ["backward", "compact", "compact_backward", "compact_into", "forward"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# older kernels take query heads that share a key head and answer NaN; their backward writes beyond the gradients
_TAKES_GROUPS = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 9)


@dataclass(frozen=True)
class _Part:
    """One flash call of a block: key rows of one of the two buffers (or of both, for a tile)."""

    gist: slice
    local: slice
    causal: bool = False
    mask: torch.Tensor | None = None


def forward(arguments: AttentionArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, Hq, N, D]`` and log-sum-exp ``[B, Hq, N]``."""
    q, k, scale = arguments.q, arguments.k, arguments.scale
    work = [_working(t) for t in arguments.buffers]
    out = torch.zeros(q.shape, dtype=work[0].dtype)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=out.dtype)
    tail = k.shape[2] - q.shape[2]
    for block in plan(arguments.intervals, k.shape[2]):
        rows = _rows(work[0], block)
        merged: tuple[torch.Tensor, torch.Tensor] | None = None
        for part in _parts(block, tail, arguments.intervals, work[0].dtype):
            keys, values = _for_each_query_head(rows, *_keys(work[1:], block, part))
            one = _flash(rows, keys, values, 0.0, part.causal, attn_mask=part.mask, scale=scale)
            merged = one if merged is None else _merge(*merged, *one)
        assert merged is not None  # every block sees at least itself
        _write(out, block, merged[0])
        _write(lse, block, merged[1])
    return out.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32))


def backward(
    arguments: AttentionArguments, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, gist_k and gist_v, summed block after block in a fixed order."""
    q, k, scale = arguments.q, arguments.k, arguments.scale
    work = [_working(t) for t in arguments.buffers]
    wide_grad, wide_out = _working(grad_out), _working(out)
    gradients = [torch.zeros(t.shape, dtype=t.dtype) for t in work]
    tail = k.shape[2] - q.shape[2]
    for block in plan(arguments.intervals, k.shape[2]):
        rows, row_grad, row_out, row_lse = (_rows(t, block) for t in (work[0], wide_grad, wide_out, lse))
        for part in _parts(block, tail, arguments.intervals, work[0].dtype):
            keys, values = _for_each_query_head(rows, *_keys(work[1:], block, part))
            # with the merged output and log-sum-exp, each part's gradients simply add up
            dq, dk, dv = _flash_backward(
                row_grad,
                rows,
                keys,
                values,
                row_out,
                row_lse,
                0.0,
                part.causal,
                attn_mask=part.mask,
                scale=scale,
            )
            dk, dv = (_of_key_heads(t, k.shape[1]) for t in (dk, dv))
            _add(gradients[0], block.batch, slice(block.begin, block.end), dq, block.repeat)
            width = part.gist.stop - part.gist.start
            for local, gist, gradient in ((1, 3, dk), (2, 4, dv)):
                if width:
                    _add(gradients[gist], block.batch, part.gist, gradient[:, :, :width])
                if part.local.stop > part.local.start:
                    _add(gradients[local], block.batch, part.local, gradient[:, :, width:], block.repeat)
    return tuple(g.to(t.dtype) for g, t in zip(gradients, arguments.buffers, strict=True))


def _working(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    # the flash kernel reads whole rows of D
    return wide if wide.stride(-1) == 1 else wide.contiguous()


def _parts(block: Block, tail: int, intervals: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Iterator[_Part]:
    """The flash calls of a block. No part is empty: the kernel divides by the number of keys."""
    gist = slice(block.gist_begin, block.gist_end)
    if block.masked:
        local = slice(block.local_begin, block.end + tail)
        vectors = [t[block.batch.start, block.begin : block.end] for t in intervals]
        yield _Part(gist, local, mask=_tile_mask(block, tail, vectors, dtype))
        return
    none = slice(0, 0)
    first = block.begin + tail
    yield _Part(none, slice(first, block.end + tail), causal=True)
    if block.local_begin < first:  # local rows that all rows of the block see, before the block
        yield _Part(none, slice(block.local_begin, first))
    if gist.start < gist.stop:
        yield _Part(gist, none)


def _tile_mask(block: Block, tail: int, vectors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """Additive mask ``[1, 1, rows, keys]`` of one tile, or None where everything is seen."""
    begin, end, start = (vector[:, None] for vector in vectors)
    compact = torch.arange(block.gist_begin, block.gist_end)
    local = torch.arange(block.local_begin, block.end + tail)
    row = torch.arange(block.begin + tail, block.end + tail)[:, None]
    seen = torch.cat([(compact >= begin) & (compact < end), (local >= start) & (local <= row)], dim=1)
    if seen.all():
        return None
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[None, None]


def _keys(buffers: list[torch.Tensor], block: Block, part: _Part) -> tuple[torch.Tensor, torch.Tensor]:
    k, v, gist_k, gist_v = buffers
    both = []
    for local, gist in ((k, gist_k), (v, gist_v)):
        pieces = [gist[block.batch, :, part.gist]] if part.gist.stop > part.gist.start else []
        if part.local.stop > part.local.start:
            pieces.append(_split(local[block.batch, :, part.local], block.repeat))
        both.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2))
    return both[0], both[1]


def _for_each_query_head(rows: torch.Tensor, *buffers: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values as the running torch takes them: with a head for each query head where it knows no groups."""
    group = 1 if _TAKES_GROUPS else rows.shape[1] // buffers[0].shape[1]
    return [buffer if group == 1 else buffer.repeat_interleave(group, 1) for buffer in buffers]


def _of_key_heads(gradient: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse for gradients: sums over the query heads that share a key head."""
    return gradient if gradient.shape[1] == heads else gradient.unflatten(1, (heads, -1)).sum(2)


def _rows(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    return _split(tensor[block.batch, :, block.begin : block.end], block.repeat)


def _split(tensor: torch.Tensor, repeat: int) -> torch.Tensor:
    """``[B, H, repeat * L, ...]`` -> ``[B * repeat, H, L, ...]``: equal segments become a batch."""
    if repeat == 1:
        return tensor
    return tensor.unflatten(2, (repeat, -1)).transpose(1, 2).flatten(0, 1)


def _joined(tensor: torch.Tensor, repeat: int) -> torch.Tensor:
    """The inverse of `_split`."""
    if repeat == 1:
        return tensor
    return tensor.unflatten(0, (-1, repeat)).transpose(1, 2).flatten(2, 3)


def _write(target: torch.Tensor, block: Block, value: torch.Tensor) -> None:
    target[block.batch, :, block.begin : block.end] = _joined(value, block.repeat)


def _add(target: torch.Tensor, batch: slice, rows: slice, value: torch.Tensor, repeat: int = 1) -> None:
    target[batch, :, rows] += _joined(value, repeat)


def _merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets, from the two results."""
    joint = torch.logaddexp(lse, other_lse)
    weight, other_weight = ((one - joint).exp()[..., None] for one in (lse, other_lse))
    return out * weight + other * other_weight, joint
