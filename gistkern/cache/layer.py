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

__all__ = ["GistLayer", "kept_rows"]


def kept_rows(rows: KeyValueRows, kept: Kept) -> KeyValueRows:
    """Those of the compact rows ``[B, Hkv, G, D]`` that later calls may see."""
    if kept is None:
        return rows
    if isinstance(kept, torch.Tensor):
        index = kept.to(rows.key.device)
        return rows.map(lambda t: gather_rows(t, index))
    return rows.map(lambda t: t[:, :, kept].clone())


class GistLayer(DynamicLayer):
    """Gist rows and tail rows of one layer, apart; which rows those are is the cache's to know.

    Attributes
    ----------
    gist : KeyValueRows
        ``[B, Hkv, G, D]``, right-aligned per sample, perhaps quantized; of a shared cache the pool ``[R, Hkv, D]``.
    tail : TailRows
        ``[B, Hkv, T, D]``, right-aligned per sample.
    dtype : torch.dtype
        What the model computes keys in. Rows may be narrower: under autocast, and quantized ones.
    """

    is_compileable = False
    gist: KeyValueRows
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

    @property
    def filled(self) -> bool:
        """Whether a call has left rows here, if only none."""
        return hasattr(self, "gist")

    @property
    def shared(self) -> bool:
        """Whether the gist rows are a pool."""
        return self.filled and self.gist.key.dim() == 3

    def tensors(self) -> list[torch.Tensor]:
        """All that is stored."""
        return [*self.gist.tensors(), self.tail.key, self.tail.value] if self.filled else []

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
        learns = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or (self.filled and self.gist.key.requires_grad)
        )
        if not self.filled:
            self.tail = TailRows(k, v)
            past = None
        else:
            q, k, v = self._alike(q, k, v)
            self.tail.extend(k, v, in_place=not learns)
            past = self.gist
        if plan.arrange is not None:
            self.tail.take(plan.arrange)
        grows = layout.gather.shape[1] > 0 and not self.shared
        if past is not None and intervals is not None and not grows and decodes(q, learns):
            pool = past if self.shared else pooled(past)
            pool = pool if pool.quantized else dequantize_rows(pool, q.dtype)
            out = intervals.decode(q, pool, self.tail.rows(), layout, scale, backend)
        else:
            if past is not None and self.shared:
                assert intervals is not None
                past = gathered(past, intervals.base, layout.past, q.dtype)
            elif past is not None:
                past = dequantize_rows(past, q.dtype)
            past_key, past_value = (None, None) if past is None else (past.key, past.value)
            out, _, key, value = attend(
                q,
                self.tail.key,
                self.tail.value,
                layout,
                past_key=past_key,
                past_value=past_value,
                scale=scale,
                backend=backend,
            )
            if past is None or grows:
                self._store(key, value, layout.past, learns)
        if not self.shared and plan.keep_gists is not None:
            kept = kept_rows(self.gist, plan.keep_gists)
            self.gist = row_by_row(kept) if kept.quantized else kept
        self.tail.keep(plan.keep_tail)
        return out

    def _alike(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a call in the type of the rows, where that is wider: under autocast."""
        given = tensors[-1].dtype
        stored = given if self.gist.quantized else self.gist.key.dtype
        if given == stored == self.tail.key.dtype:
            return tensors
        wide = torch.promote_types(torch.promote_types(given, stored), self.tail.key.dtype)
        return tensors if wide == given else tuple(t.to(wide) for t in tensors)

    def _store(self, key: torch.Tensor, value: torch.Tensor, past: int, learns: bool) -> None:
        """Take over the compact rows of a call, of which the first `past` were here before."""
        if not self.filled or not self.gist.quantized:
            self.gist = KeyValueRows(key, value)
            return
        if learns:
            raise ValueError(
                "gist rows that are trained are not quantized: use torch.no_grad(), or cache.to(gist_dtype=...) with "
                "the dtype of the model"
            )
        new = quantize_rows(KeyValueRows(key[:, :, past:], value[:, :, past:]), self.gist.key.dtype)
        both = zip(self.gist.tensors(), new.tensors(), strict=True)
        self.gist = row_by_row(KeyValueRows(*(torch.cat(pair, 2) for pair in both)))

    # ---- the whole layer

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], gists: bool = True) -> GistLayer:
        """A layer of what `function` makes of tails and, with `gists`, of gist rows; it may copy and pick samples."""
        if not self.filled:
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
        if not self.filled:
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
