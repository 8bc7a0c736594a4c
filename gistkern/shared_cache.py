"""`SharedGistCache`: samples that ask about one document read the same rows in memory."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from gistkern.attention import gist_attention
from gistkern.cache import GistCache, GistLayer
from gistkern.cache_plan import CallPlan
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.layout import GistLayout
from gistkern.pool import KeyValueRows, gist_decode

__all__ = ["SharedGistCache", "share"]


class SharedGistCache(GistCache):
    """A `GistCache` whose compact rows stand once in a pool, however many samples read them.

    `GistCache.shared` makes one. Samples that are repeated or selected (several questions, answers or beams on a
    document) and clones bring tails of their own and no rows: `nbytes` counts the rows once. Decoding reads the pool in
    place (`gistkern.gist_decode`); a call of more rows than that takes copies a layer's rows for as long as the layer
    runs. The rows stay as they are: gist tokens after the context, and `save`, are for a cache of its own.

    Attributes
    ----------
    pool : list of KeyValueRows
        ``[R, Hkv, D]`` of each layer.
    first : Tensor
        int64 ``[B]``: where each sample's rows begin in the pool.
    """

    pool: list[KeyValueRows]
    first: torch.Tensor

    def begin(self, plan: CallPlan) -> None:
        """As `GistCache.begin`; layers hold tails only, so the plan's columns are counted from there."""
        assert self.state is not None
        if plan.layout.gather.shape[1]:
            raise ValueError(
                "a shared cache cannot take gist tokens (or sinks) after its context: pass a cache of its own, "
                "GistStore.batch(names) or the one that shared() was called on"
            )
        columns = self.state.gist_columns
        arrange, keep = (None if c is None else c[:, columns:] - columns for c in (plan.arrange, plan.keep))
        super().begin(replace(plan, arrange=arrange, keep=keep))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: GistLayout,
        scale: float | None,
        backend: str,
    ) -> torch.Tensor:
        """Attention of one layer: `gist_attention` whose past rows are in the pool. `k`, `v` are ``[tail, new]``."""
        pool = self.pool[layer]
        own = self.gist_rows
        ahead = self.first - (layout.past - own)  # from a sample's column to its place in the pool
        in_place = q.shape[2] <= DECODE_ROWS and q.dtype != torch.float64 and not q.requires_grad
        if in_place:
            begin, end = ((vector + ahead[:, None]).int() for vector in (layout.gist_begin, layout.gist_end))
            out, _ = gist_decode(
                q,
                pool,
                KeyValueRows(k, v),
                gist_begin=begin,
                gist_end=end,
                local_begin=layout.local_begin,
                gist_capacity=layout.past,
                scale=scale,
                backend=backend,
            )
            return out
        column = torch.arange(layout.past, device=own.device)
        place = (column + ahead[:, None]).clamp(min=0)  # columns that a sample does not own are never seen
        past_key, past_value = (rows[place].transpose(1, 2) for rows in (pool.key, pool.value))
        return gist_attention(  # type: ignore[return-value]
            q, k, v, layout, past_key=past_key, past_value=past_value, scale=scale, backend=backend
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the pool and of all tails."""
        return super().nbytes + sum(rows.nbytes for rows in self.pool)

    def clone(self) -> SharedGistCache:
        """Tails of its own, the same rows."""
        copy = super().clone()
        assert isinstance(copy, SharedGistCache)
        copy.pool, copy.first = self.pool, self.first
        return copy

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SharedGistCache:
        """A copy, pool included, on another device or in another dtype."""
        copy = super().to(device, dtype)
        assert isinstance(copy, SharedGistCache)
        copy.pool = [KeyValueRows(*(t.to(device=device, dtype=dtype) for t in (p.key, p.value))) for p in self.pool]
        copy.first = self.first.to(device)
        return copy

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples `indices`, in that order; rows are not moved."""
        super().batch_select_indices(indices)
        self.first = self.first[indices.to(self.first.device)]

    def shared(self) -> SharedGistCache:
        """Itself cloned: it is shared already."""
        return self.clone()

    def reset(self) -> None:
        """Refused: the rows belong to all that share them."""
        raise ValueError("a shared cache is not reset: take a fresh clone, or share another cache")

    def save(self, path: str | os.PathLike) -> None:
        """Refused: a file holds a cache of its own."""
        raise ValueError("a shared cache is not saved: save the cache that shared() was called on")


def share(cache: GistCache) -> SharedGistCache:
    """See `GistCache.shared`."""
    state = cache.state
    if state is None:
        raise ValueError("the cache is empty: compress a context first")
    if state.tail_columns:
        raise ValueError("the cache has an uncompressed tail: share it before asking")
    owned = torch.arange(state.gist_columns, device=state.seen.device) >= state.gist_columns - state.gist_rows[:, None]
    made = SharedGistCache()
    made.positions, made.fingerprint, made.unchecked = cache.positions, cache.fingerprint, cache.unchecked
    made.state = state
    made.pool = [
        KeyValueRows(*(t.transpose(1, 2)[owned] for t in (layer.keys, layer.values))) for layer in cache.layers
    ]
    made.first = state.gist_rows.cumsum(0) - state.gist_rows
    made.layers = [GistLayer.holding(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in cache.layers]
    return made
