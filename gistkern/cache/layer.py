"""One layer of a cache: gist rows and tail rows, in two buffers that are never joined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicLayer

from gistkern.cache.plan import CallPlan, Kept
from gistkern.cache.pool import PoolIntervals, decodes, gathered, pooled, row_by_row
from gistkern.cache.tail import TailRows
from gistkern.layout import GistLayout
from gistkern.ops.attention import AttentionOptions, attend
from gistkern.rows import LARGEST, KeyValueRows, dequantize_rows, gather_rows, quantize_rows

__all__ = ["GistLayer"]


def _kept(rows: KeyValueRows, kept: Kept) -> KeyValueRows:
    """Those of a layer's gist rows that stay; all of those that samples share."""
    if kept is None or rows.key.dim() == 3:
        return rows
    if isinstance(kept, slice):
        found = rows.map(lambda t: t[:, :, kept].clone())  # a view would hold the others in memory
    else:
        index = kept.to(rows.key.device)
        found = rows.map(lambda t: gather_rows(t, index))
    return row_by_row(found) if found.quantized else found


def _any_learns(*tensors: torch.Tensor | None) -> bool:
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


def _attend_own(
    gist: KeyValueRows | None, tail: TailRows, q: torch.Tensor, layout: GistLayout, options: AttentionOptions
) -> tuple[torch.Tensor, KeyValueRows]:
    """Over rows of each sample's own, as floats: the compact rows of the call take their place."""
    key, value = (None, None) if gist is None else (gist.key, gist.value)
    if key is not None and key.dtype != q.dtype:  # stored under autocast
        key, value = key.to(q.dtype), value.to(q.dtype)  # type: ignore[union-attr]
    out, _, key, value = attend(q, tail.key, tail.value, layout, options, past_key=key, past_value=value)
    return out, KeyValueRows(key, value) if gist is None or layout.gather.shape[1] else gist


def _with_quantized(gist: KeyValueRows, key: torch.Tensor, value: torch.Tensor, learns: bool) -> KeyValueRows:
    """Quantized rows, which stay as they are, with the compact rows of a call behind them."""
    if learns:
        raise ValueError(
            "gist rows that are trained are not quantized: use torch.no_grad(), or cache.to(gist_dtype=...) with "
            "the dtype of the model"
        )
    both = zip(gist.tensors(), quantize_rows(KeyValueRows(key, value), gist.key.dtype).tensors(), strict=True)
    return row_by_row(KeyValueRows(*(torch.cat(pair, 2) for pair in both)))


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
    _room: tuple[torch.Tensor, torch.Tensor] | None = None  # within a compression: buffers that begin with the rows

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
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention over the gist rows, the tail and the call's own rows; those stay that later calls may see.

        `intervals` are of rows that are read where they stand (shared or quantized ones), None for others. Where an
        error is raised the layer stays as it was.
        """
        gist = self.gist
        if gist is None:
            learns, tail = _any_learns(q, k, v), TailRows(k, v)
        else:
            if not gist.key.dtype == v.dtype == self.tail.key.dtype:
                q, k, v = self._alike(q, k, v)
            learns = _any_learns(q, k, v, gist.key, options.learned_sinks)
            tail = self.tail.extended(k, v, not learns)
        if plan.arrange is not None:
            tail.take(plan.arrange)
        if intervals is None or gist is None:
            out, gist = _attend_own(gist, tail, q, layout, options)
        else:
            out, gist = self._attend_in_place(gist, tail, q, layout, intervals, learns, options)
        if plan.keep_gists is not None:
            gist = _kept(gist, plan.keep_gists)
        if plan.keep_tail is not None:
            tail.keep(plan.keep_tail)
        self.gist, self.tail = gist, tail
        return out

    def read(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: GistLayout,
        plan: CallPlan,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """`attend` of a call of `gistkern.compress`: without a graph, a tail or quantized rows.

        The first of several calls makes room for the rows of all, in which each writes its own behind those before.
        """
        gist, room = self.gist, self._room
        past_key, past_value = (None, None) if gist is None else (gist.key, gist.value)
        if gist is None and plan.capacity and not torch.compiler.is_compiling():
            shape = (*k.shape[:2], plan.capacity, k.shape[3])
            room = k.new_empty(shape), v.new_empty(shape)
        out, _, key, value = attend(q, k, v, layout, options, past_key=past_key, past_value=past_value, room=room)
        rows = KeyValueRows(key, value)
        if plan.keep_gists is not None:
            rows, room = _kept(rows, plan.keep_gists), None
        elif room is not None and (key.shape[2] == plan.capacity or key.data_ptr() != room[0].data_ptr()):
            room = None  # it is full, or operators (under a dispatch mode, say) have not written to it
        if gist is None:
            none = k.new_empty((*k.shape[:2], 0, k.shape[3]))
            self.tail = TailRows(none, v.new_empty(none.shape))
        self.gist, self._room = rows, room
        return out

    def _attend_in_place(
        self,
        gist: KeyValueRows,
        tail: TailRows,
        q: torch.Tensor,
        layout: GistLayout,
        intervals: PoolIntervals,
        learns: bool,
        options: AttentionOptions,
    ) -> tuple[torch.Tensor, KeyValueRows]:
        """Over rows that `gist_decode` reads where they stand, or over a copy of them that goes with the layer."""
        shared, grows = gist.key.ndim == 3, layout.gather.shape[1] > 0
        if (shared or not grows) and decodes(q, learns):
            pool = gist if shared else pooled(gist)
            if pool.key.dtype != q.dtype and not pool.quantized:
                pool = dequantize_rows(pool, q.dtype)
            return intervals.decode(q, pool, (tail.key, tail.value), layout, options), gist
        past = gathered(gist, intervals.base, layout.past, q.dtype) if shared else dequantize_rows(gist, q.dtype)
        out, _, key, value = attend(q, *tail.pair, layout, options, past_key=past.key, past_value=past.value)
        if grows and not shared:
            gist = _with_quantized(gist, key[:, :, layout.past :], value[:, :, layout.past :], learns)
        return out, gist

    def keep_gists(self, kept: Kept) -> None:
        """Take those of the gist rows in place of all; shared ones stay."""
        assert self.gist is not None
        self.gist = _kept(self.gist, kept)

    def _alike(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a call in the type of the rows, where that is wider: under autocast."""
        assert self.gist is not None
        given = tensors[-1].dtype
        stored = given if self.gist.quantized else self.gist.key.dtype
        wide = torch.promote_types(torch.promote_types(given, stored), self.tail.key.dtype)
        return tensors if wide == given else tuple(t.to(wide) for t in tensors)

    # ---- the whole layer

    def __deepcopy__(self, memo: dict[int, object]) -> GistLayer:
        """Rows of a call with gradients are no leaves, which a tensor's own deepcopy refuses."""
        return self.map(torch.clone)

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
        wanted = gist_dtype or (held if self.gist.quantized or dtype == self.dtype else dtype)
        same = dtype == self.dtype and wanted == held and device in (None, self.gist.key.device)
        if same:
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, non_blocking=non_blocking, copy=True)

        gist = self.gist.map(moved)
        if wanted != held:
            wide = dequantize_rows(gist, torch.float32 if wanted in LARGEST else wanted)
            gist = quantize_rows(wide, wanted) if wanted in LARGEST else wide
        tail = self.tail.map(lambda t: moved(t).to(float_dtype))
        return GistLayer.holding(gist, tail, dtype)
