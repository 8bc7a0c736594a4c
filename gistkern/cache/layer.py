"""One layer of a cache: gist rows and tail rows, in two buffers that are never joined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer

from gistkern.cache.plan import CallPlan, Kept
from gistkern.cache.pool import PoolIntervals, decodes, gathered, pooled, row_by_row
from gistkern.cache.tail import TailRows
from gistkern.layout import GistLayout
from gistkern.ops.attention import attend
from gistkern.rows import KeyValueRows, dequantize_rows, gather_rows, quantize_rows

__all__ = ["GistLayer"]


def _kept(rows: KeyValueRows, kept: slice | torch.Tensor) -> KeyValueRows:
    if isinstance(kept, slice):
        return rows.map(lambda t: t[:, :, kept].clone())  # a view would hold the others in memory
    index = kept.to(rows.key.device)
    return rows.map(lambda t: gather_rows(t, index))


class GistLayer(DynamicLayer):
    """Gist rows and tail rows of one layer, apart; which rows those are is the cache's to know.

    Attributes
    ----------
    gist : KeyValueRows or None
        ``[B, Hkv, G, D]``, right-aligned per sample, perhaps quantized; of a shared cache the pool ``[R, Hkv, D]``.
        None before the first call.
    tail : TailRows
        ``[B, Hkv, T, D]``, right-aligned per sample.
    dtype : torch.dtype
        What the model computes keys in. Rows may be narrower: under autocast, and quantized ones.
    """

    is_compileable = False
    gist: KeyValueRows | None = None
    tail: TailRows

    @classmethod
    def holding(cls, gist: KeyValueRows, tail: TailRows, dtype: torch.dtype) -> GistLayer:
        """A layer that has these rows already."""
        layer = cls()
        layer.gist = row_by_row(gist) if gist.quantized and gist.key.dim() == 4 else gist
        layer.tail = tail
        layer.dtype, layer.device, layer.is_initialized = dtype, gist.key.device, True
        return layer

    def lazy_initialization(self, key_states, value_states=None):
        """Type and place; written here because what transformers' own takes and sets differs between versions."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def tensors(self) -> list[torch.Tensor]:
        """All that is stored."""
        return [*self.gist.tensors(), self.tail.key, self.tail.value] if self.gist is not None else []

    # ---- a model call

    def update(self, key_states, value_states, *args, **kwargs):
        """The call's own rows as they came: attention stores them, which reads the others where they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        if key_states.dtype != self.dtype or key_states.device != self.device:
            raise ValueError(
                f"the cache holds {self.dtype} on {self.device}, the model computes {key_states.dtype} "
                f"on {key_states.device}: compress with the model that reads the cache, or use cache.to(...)"
            )
        return key_states, value_states

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: GistLayout,
        plan: CallPlan,
        intervals: PoolIntervals | None,
        scale: float | None,
        backend: str,
    ) -> torch.Tensor:
        """Attention over the gist rows, the tail and the call's own rows; those stay that later calls may see.

        `intervals` are of rows that are read where they stand (shared or quantized ones), None for others.
        """
        gist = self.gist
        if gist is None:
            learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
            self.tail = TailRows(k, v)
        else:
            if not gist.key.dtype == v.dtype == self.tail.key.dtype:
                q, k, v = self._alike(q, k, v)
            learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, gist.key))
            self.tail.extend(k, v, in_place=not learns)
        if plan.arrange is not None:
            self.tail.take(plan.arrange)
        if intervals is None or gist is None:
            out = self._attend_own(gist, q, layout, scale, backend)
        else:
            out = self._attend_in_place(gist, q, layout, intervals, learns, scale, backend)
        if plan.keep_gists is not None:
            self.keep_gists(plan.keep_gists)
        if plan.keep_tail is not None:
            self.tail.keep(plan.keep_tail)
        return out

    def _attend_own(
        self, gist: KeyValueRows | None, q: torch.Tensor, layout: GistLayout, scale: float | None, backend: str
    ) -> torch.Tensor:
        """Over rows of each sample's own, as floats: the compact rows of the call take their place."""
        key, value = (None, None) if gist is None else (gist.key, gist.value)
        if key is not None and key.dtype != q.dtype:  # stored under autocast
            key, value = key.to(q.dtype), value.to(q.dtype)  # type: ignore[union-attr]
        tail = self.tail
        out, _, key, value = attend(
            q, tail.key, tail.value, layout, past_key=key, past_value=value, scale=scale, backend=backend
        )
        if gist is None or layout.gather.shape[1]:
            self.gist = KeyValueRows(key, value)
        return out

    def _attend_in_place(
        self,
        gist: KeyValueRows,
        q: torch.Tensor,
        layout: GistLayout,
        intervals: PoolIntervals,
        learns: bool,
        scale: float | None,
        backend: str,
    ) -> torch.Tensor:
        """Over rows that `gist_decode` reads where they stand, or over a copy of them that goes with the layer."""
        shared, grows = gist.key.dim() == 3, layout.gather.shape[1] > 0
        if (shared or not grows) and decodes(q, learns):
            pool = gist if shared else pooled(gist)
            pool = pool if pool.quantized else dequantize_rows(pool, q.dtype)
            return intervals.decode(q, pool, KeyValueRows(*self.tail.pair), layout, scale, backend)
        past = gathered(gist, intervals.base, layout.past, q.dtype) if shared else dequantize_rows(gist, q.dtype)
        out, _, key, value = attend(
            q, *self.tail.pair, layout, past_key=past.key, past_value=past.value, scale=scale, backend=backend
        )
        if grows and not shared:
            self._add_quantized(gist, key[:, :, layout.past :], value[:, :, layout.past :], learns)
        return out

    def keep_gists(self, kept: Kept) -> None:
        """Take those of the gist rows in place of all; shared ones stay."""
        assert self.gist is not None
        if self.gist.key.dim() == 4 and kept is not None:
            rows = _kept(self.gist, kept)
            self.gist = row_by_row(rows) if rows.quantized else rows

    def _alike(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a call in the type of the rows, where that is wider: under autocast."""
        assert self.gist is not None
        given = tensors[-1].dtype
        stored = given if self.gist.quantized else self.gist.key.dtype
        wide = torch.promote_types(torch.promote_types(given, stored), self.tail.key.dtype)
        return tensors if wide == given else tuple(t.to(wide) for t in tensors)

    def _add_quantized(self, gist: KeyValueRows, key: torch.Tensor, value: torch.Tensor, learns: bool) -> None:
        """Compact rows of a call behind those that are here, which stay as they are."""
        if learns:
            raise ValueError(
                "gist rows that are trained are not quantized: use torch.no_grad(), or cache.to(gist_dtype=...) with "
                "the dtype of the model"
            )
        both = zip(gist.tensors(), quantize_rows(KeyValueRows(key, value), gist.key.dtype).tensors(), strict=True)
        self.gist = row_by_row(KeyValueRows(*(torch.cat(pair, 2) for pair in both)))

    # ---- the whole layer

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], gists: bool = True) -> GistLayer:
        """A layer of what `function` makes of tails and, with `gists`, of gist rows; it may copy and pick samples."""
        if self.gist is None:
            return GistLayer()
        gist = self.gist.map(function) if gists else self.gist
        return GistLayer.holding(gist, self.tail.map(function), self.dtype)

    def to(
        self,
        device: torch.device | None,
        dtype: torch.dtype | None,
        gist_dtype: torch.dtype | None,
        non_blocking: bool = False,
    ) -> GistLayer:
        """See `GistCache.to`; itself where nothing changes."""
        if self.gist is None:
            return self
        dtype = self.dtype if dtype is None else dtype
        float_dtype = self.tail.key.dtype if dtype == self.dtype else dtype  # narrower under autocast
        held = self.gist.key.dtype
        wanted = gist_dtype or (held if self.gist.quantized else float_dtype)
        same = dtype == self.dtype and wanted == held and device in (None, self.gist.key.device)
        if same:
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, non_blocking=non_blocking, copy=True)

        gist = self.gist.map(moved)
        if wanted != held:
            wide = dequantize_rows(gist, float_dtype if gist.quantized else held)
            gist = quantize_rows(wide, wanted) if wanted.itemsize == 1 else dequantize_rows(wide, wanted)
        tail = self.tail.map(lambda t: moved(t).to(float_dtype))
        return GistLayer.holding(gist, tail, dtype)
