"""How many rows a cache holds, of what type, and in how many bytes."""

from __future__ import annotations

from typing import Any

import torch

from gistkern.cache.plan import CacheState
from gistkern.cache.pool import base_of, gathered
from gistkern.cache.running import UNPATCHED, ModelCall, check_whole
from gistkern.rows import dequantize_rows

__all__ = ["Sized"]


class Sized:
    """Samples, rows, types and bytes of a `GistCache`."""

    layers: list[Any]
    state: CacheState | None
    first: torch.Tensor | None
    _call: ModelCall | None

    @property
    def batch_size(self) -> int:
        """Samples in the cache, -1 before the first call."""
        return -1 if self.state is None else len(self.state.seen)

    @property
    def gist_rows(self) -> torch.Tensor:
        """int64 ``[B]``: compact rows (gists and sinks) of each sample."""
        return self._state().gist_rows

    @property
    def tail_rows(self) -> torch.Tensor:
        """int64 ``[B]``: uncompressed rows of each sample."""
        return self._state().tail_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values, and of their scales (not of the room that a tail grows into)."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors())

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the model computes in; None before the first call."""
        return self.layers[0].dtype if self.layers else None

    @property
    def gist_dtype(self) -> torch.dtype | None:
        """The dtype in which the gist rows are stored; None before the first call."""
        return self.layers[0].gist.key.dtype if self.layers and self.layers[0].gist is not None else None

    def shape(self) -> set[tuple[int, int, int]]:
        """(layers, key/value heads, head dimension) of the stored rows; empty before the first call."""
        rows = (layer.tail.key for layer in self.layers if layer.gist is not None)
        return {(len(self.layers), key.shape[1], key.shape[3]) for key in rows}

    def compact(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[B, Hkv, G, D]`` of a layer's compact rows, as floats; each sample's are the last ones."""
        check_whole(self._call)
        columns, held = self._state().gist_columns, self.layers[layer]
        dtype = held.dtype if held.gist.quantized else held.gist.key.dtype
        if self.first is None:
            rows = dequantize_rows(held.gist, dtype)
        else:
            rows = gathered(held.gist, base_of(self._state(), self.first), columns, dtype)
        return rows.key, rows.value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens read so far by the longest sample."""
        return 0 if self.state is None else self.state.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Physical length with `query_length` new rows, and offset 0."""
        if query_length < 1:  # an unpatched model cuts a context off that the question does not hold
            raise RuntimeError(UNPATCHED)
        if self.state is None:
            return query_length, 0
        return self.state.gist_columns + self.state.tail_columns + query_length, 0

    def _state(self) -> CacheState:
        if self.state is None:
            raise ValueError("the cache is empty: no model call has written to it yet")
        return self.state

    def without_tail(self, advice: str) -> CacheState:
        """The state of a compressed context; ValueError, ending in `advice`, where there is none or more than that."""
        check_whole(self._call)
        if self.state is None:
            raise ValueError("the cache is empty: compress a context first")
        if self.state.tail_columns:
            raise ValueError(f"the cache has an uncompressed tail: {advice}")
        return self.state
