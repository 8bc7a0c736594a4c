"""One layer of a cache of fixed size: gist rows that stay, and room for tail rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from gistkern.cache.layer import GistLayer
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.ops.attention import AttentionOptions
from gistkern.ops.decode import Decodes, Seen
from gistkern.rows import KeyValueRows, dequantize_rows, gather_rows

__all__ = ["FixedLayer", "Piece", "fixed_address"]


class Piece(NamedTuple):
    """Up to 8 query rows ``[begin, end)`` of a call, and what they see."""

    begin: int
    end: int
    seen: Seen


def fixed_address(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of which `torch.compile` learns that it lies where it lies: CUDA graphs write to it in place."""
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


class FixedLayer:
    """Gist rows and the buffers of tail rows of one layer.

    Attributes
    ----------
    gist : KeyValueRows
        A pool ``[R, Hkv, D]``, which nobody writes; perhaps quantized.
    tail : KeyValueRows
        ``[B, Hkv, room + spare, D]``, left-aligned: row r of a sample is its token r behind the context. Row `room`
        takes what is padding.
    """

    def __init__(self, gist: KeyValueRows, tail: KeyValueRows) -> None:
        self.gist, self.tail, self.decodes = gist, tail, Decodes()
        for tensor in (*gist.tensors(), *tail.tensors()):
            fixed_address(tensor)

    @classmethod
    def of(cls, layer: GistLayer, owned: torch.Tensor | None, tail_rows: torch.Tensor, room: int) -> FixedLayer:
        """Copies of a layer's rows.

        `owned` (bool ``[B, G]``) are the columns that are a sample's, None where rows are shared already and stay where
        they are; `tail_rows` (int64 ``[B]``) how many tail rows a sample has.
        """
        assert layer.gist is not None
        held, dtype = layer.tail.key, layer.tail.key.dtype
        gist = layer.gist.map(torch.Tensor.detach)
        if owned is not None:
            picked = owned.to(gist.key.device)
            gist = gist.map(lambda t: t.transpose(1, 2)[picked])
        gist = gist if gist.quantized else dequantize_rows(gist, dtype)
        columns = held.shape[2]
        first = columns - tail_rows.to(held.device)
        index = (first[:, None] + torch.arange(columns, device=held.device)).clamp(max=max(columns - 1, 0))
        buffers = []
        for rows in layer.tail.pair:
            # a call's padding goes to the row behind the room; kernels want as many rows as there are queries
            spare = max(1, DECODE_ROWS - room)
            buffer = rows.new_zeros((*rows.shape[:2], room + spare, rows.shape[3]))
            if columns:
                buffer[:, :, :columns] = gather_rows(rows.detach(), index)
            buffers.append(buffer)
        return cls(gist, KeyValueRows(*buffers))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.gist.nbytes + self.tail.nbytes

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        index: torch.Tensor,
        pieces: list[Piece],
        capacity: int,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Write a call's rows ``[B, Hkv, N, D]`` where `index` (int64, alike) says; attend to what `pieces` see."""
        gist, tail = self.gist, self.tail
        key, value = tail.key, tail.value
        if not k.dtype == q.dtype == key.dtype or k.device != key.device:
            raise ValueError(
                f"the cache holds {key.dtype} on {key.device}, the model computes {k.dtype} on "
                f"{k.device}: fix the size of a cache that this model has compressed"
            )
        key.scatter_(2, index, k)
        value.scatter_(2, index, v)
        decode, own = self.decodes.decode, (key, value)
        first, *others = pieces
        if not others:
            return decode(q, gist, own, first.seen, capacity, options)
        return torch.cat(
            [decode(q[:, :, one.begin : one.end], gist, own, one.seen, capacity, options) for one in pieces], 2
        )

    def copied(self, function: Callable[[torch.Tensor], torch.Tensor]) -> FixedLayer:
        """A layer with the same gist rows and tails that `function` makes: copies, perhaps of other samples."""
        return FixedLayer(self.gist, self.tail.map(function))

    def reorder(self, index: torch.Tensor) -> None:
        """Tails of samples `index`, as many as there are, written in place of all."""
        for buffer in self.tail.tensors():
            buffer.copy_(buffer.index_select(0, index))
