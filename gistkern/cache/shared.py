"""`SharedGistCache`: samples that ask about one document read the same rows in memory."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from gistkern.cache.cache import GistCache, GistLayer
from gistkern.cache.plan import CallPlan
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.layout import GistLayout
from gistkern.ops.attention import gist_attention
from gistkern.ops.decode import gist_decode
from gistkern.rows import KeyValueRows

__all__ = ["SharedGistCache", "share"]


class SharedGistCache(GistCache):
    """A `GistCache` whose compact rows stand once in a pool, however many samples read them.

    `GistCache.shared` makes one. Samples that are repeated or selected (several questions, answers or beams on a
    document) and clones bring tails of their own and no rows: `nbytes` counts the rows once. Calls of up to 8 rows read
    the pool in place where the backend's kernel does (`gistkern.gist_decode`: ``cpu`` and ``cuda``); all others copy a
    layer's rows for as long as the layer runs. The rows stay as they are: gist tokens after the context, and `save`,
    are for a cache of its own.

    Attributes
    ----------
    pool : list of KeyValueRows
        ``[R, Hkv, D]`` of each layer.
    first : Tensor
        int64 ``[B]``: where each sample's rows begin in the pool.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool: list[KeyValueRows] = []
        self.first = torch.zeros(0, dtype=torch.int64)

    def begin(self, plan: CallPlan, ids: torch.Tensor | None = None) -> None:
        """As `GistCache.begin`; layers hold tails only, so the plan's columns are counted from there."""
        state = self.state
        if state is None:
            raise ValueError("a shared cache is made by GistCache.shared(), of a compressed context")
        if plan.keep is not None and bool(plan.layout.is_gist.any()):
            raise ValueError(
                "a shared cache cannot take gist tokens after its context: pass a cache of its own, "
                "GistStore.batch(names) or the one that shared() was called on"
            )
        if plan.after.gist_rows is not state.gist_rows and not torch.equal(plan.after.gist_rows, state.gist_rows):
            raise ValueError("a shared cache keeps all rows of its context: this gist_layout would drop or add some")
        arrange = None if plan.arrange is None else plan.arrange[:, state.gist_columns :] - state.gist_columns
        keep = None if plan.keep is None else plan.keep[:, plan.after.gist_columns :] - state.gist_columns
        super().begin(replace(plan, arrange=arrange, keep=keep), ids)
        ahead = self._ahead()
        self._begin, self._end = ((column + ahead).int() for column in (plan.layout.gist_begin, plan.layout.gist_end))

    def _ahead(self) -> torch.Tensor:
        """int64 ``[B, 1]``: from a sample's column to its place in the pool."""
        return (self.first - (self._state().gist_columns - self.gist_rows))[:, None]

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
        dtype = torch.promote_types(v.dtype, pool.value.dtype)  # they differ under autocast
        q, k, v = (t.to(dtype) for t in (q, k, v))
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        if q.shape[2] <= DECODE_ROWS and dtype != torch.float64 and not learns:
            out, _ = gist_decode(
                q,
                KeyValueRows(pool.key.to(dtype), pool.value.to(dtype)),
                KeyValueRows(k, v),
                gist_begin=self._begin.to(q.device),
                gist_end=self._end.to(q.device),
                local_begin=layout.local_begin,
                gist_capacity=layout.past,
                scale=scale,
                backend=backend,
            )
            return out
        past_key, past_value = (t.to(dtype) for t in self.compact(layer))
        return gist_attention(  # type: ignore[return-value]
            q, k, v, layout, past_key=past_key, past_value=past_value, scale=scale, backend=backend
        )

    def compact(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `GistCache.compact`, copied out of the pool; columns that a sample does not own hold rows of others."""
        place = (torch.arange(self._state().gist_columns, device=self.first.device) + self._ahead()).clamp(min=0)
        pool = self.pool[layer]
        place = place.to(pool.key.device)
        return pool.key[place].transpose(1, 2), pool.value[place].transpose(1, 2)

    def _tensors(self) -> list[torch.Tensor]:
        """Those of the pool too, once."""
        return [*super()._tensors(), *(tensor for rows in self.pool for tensor in (rows.key, rows.value))]

    def clone(self) -> SharedGistCache:
        """Tails of its own, the same rows."""
        copy = super().clone()
        assert isinstance(copy, SharedGistCache)
        copy.pool, copy.first = self.pool, self.first
        return copy

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> SharedGistCache:
        """As `GistCache.to`, pool included."""
        copy = super().to(device, dtype, non_blocking)
        assert isinstance(copy, SharedGistCache)
        if copy is not self:
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
    state = cache.without_tail("share it before asking")
    owned = torch.arange(state.gist_columns, device=state.seen.device) >= state.gist_columns - state.gist_rows[:, None]
    made = SharedGistCache()
    made.take_origin(cache)
    made.state = state
    made.first = state.gist_rows.cumsum(0) - state.gist_rows
    for layer in cache.layers:
        # compressed under autocast keys are wider than values, and are read as those
        rows = (t.transpose(1, 2)[owned].to(layer.values.dtype) for t in (layer.keys, layer.values))
        made.pool.append(KeyValueRows(*rows))
        # not a view: it would keep the original's rows in memory
        tails = (t.new_empty((*t.shape[:2], 0, t.shape[3])) for t in (layer.keys, layer.values))
        made.layers.append(GistLayer.holding(*tails))
    return made
