"""`GistCache`: the compact gist rows and the uncompressed tail, as a transformers cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from gistkern.cache import on_disk
from gistkern.cache.file import FLOATS, check_device
from gistkern.cache.fingerprint import check_cache
from gistkern.cache.fixed import FixedGistCache
from gistkern.cache.layer import GistLayer
from gistkern.cache.offload import input_device
from gistkern.cache.plan import CacheState, CallPlan
from gistkern.cache.pool import PoolIntervals, base_of, gathered
from gistkern.cache.reader import Reader, patched
from gistkern.cache.running import UNPATCHED, ModelCall, check_whole
from gistkern.cache.signed import Signed
from gistkern.cache.step import Steps
from gistkern.cache.tokens_read import TokensRead
from gistkern.cache.versions import CROP_TAKES_LENGTH
from gistkern.layout import GistLayout
from gistkern.ops.attention import AttentionOptions
from gistkern.rows import LARGEST, check_gist_dtype, dequantize_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

__all__ = ["GistCache"]


class GistCache(Signed, Cache):
    """A KV cache of gist rows and an uncompressed tail, for a model patched by `gistkern.patch_llama`.

    `gistkern.compress` makes one; ``model.generate(question_ids, past_key_values=cache.clone())`` reads it; the tokens
    passed to `generate` are those *after* the compressed context. An empty one streams: each model call appends, and a
    segment's raw rows are dropped once it is ended. Samples may own different numbers of rows (a ragged batch).
    `get_seq_length` counts every token that was read, `nbytes` and `get_mask_sizes` the rows that are stored.

    Attributes
    ----------
    layers : list of GistLayer
        Gist rows and tail rows of each layer.
    state : CacheState
        Per-sample counts. None until the first call.
    positions : str
        Position scheme of the model that wrote the cache.
    read : TokensRead
        The tokens that were read after the compressed context.
    contexts : set of ContextRead
        Digests of the contexts that were compressed, of all samples.
    first : Tensor or None
        Of a shared cache (`shared`): int64 ``[B]``, where each sample's rows begin in the layers' pools.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> gistkern.compress(model, tokenizer("The bell is with Mira.", return_tensors="pt")).save("mira.safetensors")
    >>> cache = GistCache.load("mira.safetensors", model)
    >>> cache, cache.clone().shared().nbytes, cache.to(gist_dtype=torch.int8).nbytes
    (GistCache(batch=1, tokens=8, gist rows=[3], tail rows=[0], 1536 bytes), 1536, 480)
    """

    layers: list[Any]

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=GistLayer)
        Signed.__init__(self)
        self.state: CacheState | None = None
        self.read = TokensRead()
        self.first: torch.Tensor | None = None
        self._call: ModelCall | None = None
        self._intervals: PoolIntervals | None = None
        self.steps = Steps()

    @classmethod
    def in_place_of(cls, cache: DynamicCache) -> GistCache:
        """An empty transformers cache as a GistCache: the same object, so that its owner holds what is read."""
        cache.__class__ = cls  # type: ignore[assignment]
        cache.__init__()  # type: ignore[misc]
        return cache  # type: ignore[return-value]

    def __repr__(self) -> str:
        name = type(self).__name__
        if self.state is None:
            return f"{name}(empty)"
        rows = f"gist rows={self.gist_rows.tolist()}, tail rows={self.tail_rows.tolist()}"
        return f"{name}(batch={self.batch_size}, tokens={self.get_seq_length()}, {rows}, {self.nbytes} bytes)"

    # ---- one model call: begin, update and attend layer by layer, commit

    def begin(self, plan: CallPlan, ids: torch.Tensor | None = None) -> None:
        """Use `plan` for the model call that follows, which brings `ids` (None: embeddings).

        RuntimeError if the call before it failed after some layers had been updated, ValueError if the rows are shared
        and the call would change them.
        """
        if self._call is not None:
            check_whole(self._call)
        if self.state is None:
            self.layers = []  # those of a call that failed know its type and place
        pooled = not plan.context and (self.first is not None or self.gist_dtype in LARGEST)
        self._intervals = PoolIntervals.of(plan, self.state, self.first, self._intervals) if pooled else None
        self._call = ModelCall(plan, ids, self._intervals)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """The call's own rows, as they came: `attend` stores them. RuntimeError outside a patched model's call."""
        if self._call is None:
            raise RuntimeError(UNPATCHED)
        if len(self.layers) <= layer_idx:
            self.layers += [GistLayer() for _ in range(layer_idx + 1 - len(self.layers))]
        return self.layers[layer_idx].update(key_states, value_states)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: GistLayout,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of a layer's queries over what is stored and the call's own rows `k`, `v`, which are stored too.

        `layout` is the plan's, on the layer's device and with its window; the options are `gistkern.gist_attention`'s.
        """
        call = self._call
        if call is None:
            raise RuntimeError(UNPATCHED)
        held, given = self.layers[layer], (q, k, v, layout, call.plan)
        out = held.read(*given, options) if call.plan.context else held.attend(*given, call.intervals, options)
        call.touched = True  # a layer that raises an error is as it was
        return out

    def commit(self) -> None:
        """End the model call: its plan's state becomes the cache's."""
        if (call := self._call) is None:
            return
        plan = call.plan
        if not plan.context:
            self.read.add(call.columns(), plan.real)
        self.state, self._call, self.steps.last = plan.after, None, plan if plan.raw else None

    def abandon(self) -> None:
        """End a model call that failed: before the first layer was updated it changes nothing."""
        if self._call is not None:
            self._call.failed = True
            self._call = self._call if self._call.touched else None

    def knows(self, handle: Reader, tokens: int) -> bool:
        """Whether a model may read the cache: asked of its weights too, but for single tokens behind a tail."""
        return self.accepted(handle, anew=self.state is not None and (tokens > 1 or not self.state.tail_columns))

    # ---- sizes

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

    # ---- whole-cache operations

    def clone(self) -> GistCache:
        """An independent copy, so that one compressed context answers several questions. Shared rows stay shared."""
        copy = self._alike()
        copy.layers = [layer.map(torch.clone, gists=self.first is None) for layer in self.layers]
        return copy

    def __getstate__(self) -> dict[str, object]:
        """See `Signed`; for pickle and deepcopy."""
        check_whole(self._call)
        return super().__getstate__() | {"steps": Steps(), "_intervals": None}

    def _alike(self) -> GistCache:
        """A cache of the same state and origin, without layers."""
        check_whole(self._call)
        copy = type(self)()
        copy.take_origin(self)
        copy.state, copy.first, copy.read = self.state, self.first, TokensRead(self.read.ids())
        return copy

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        *,
        gist_dtype: torch.dtype | None = None,
    ) -> GistCache:
        """The cache on another device or in another dtype: a copy, or itself where nothing changes, as of a tensor.

        Within a model's call it stays where it is: each layer's rows are where that layer is.

        Parameters
        ----------
        device, non_blocking
            As of a tensor.
        dtype : torch.dtype, optional
            That of the model which reads the cache. ValueError for one that no model computes in.
        gist_dtype : torch.dtype, optional
            What gist rows are held in: int8 or float8_e4m3fn, with an fp32 scale for each row and head
            (docs/guides/corpora.md), or the model's dtype. Quantized rows stay so unless another type is asked for.
        """
        place = None if device is None else torch.empty(0, device=device).device  # of "cuda": its current one
        if dtype is not None and dtype not in FLOATS:
            raise ValueError(f"dtype is what the model computes in, a float of 2 bytes or more, got {dtype}")
        check_gist_dtype(gist_dtype, dtype or self.dtype)
        if self._call is not None and not self._call.failed and dtype is gist_dtype is None:
            return self
        layers = [layer.to(place, dtype, gist_dtype, non_blocking) for layer in self.layers]
        if all(one is other for one, other in zip(layers, self.layers, strict=True)):
            return self
        copy = self._alike()
        copy.layers, copy.read = layers, copy.read.to(device)
        if device is not None and copy.state is not None:
            copy.state = copy.state.on(device)
            copy.first = None if copy.first is None else copy.first.to(device)
        return copy

    def shared(self) -> GistCache:
        """A copy whose gist rows stand once in memory, however many questions, answers or beams read them.

        Samples that are repeated or selected, and clones, bring tails of their own and no rows
        (docs/guides/corpora.md). The rows stay as they are: gist tokens after the context, `reset` and `save` are for
        a cache of its own. ValueError if the cache is empty or has a tail.
        """
        if self.first is not None:
            return self.clone()
        state = self.without_tail("share it before asking")
        owned, copy = state.owned_gists(), self._alike()
        copy.first = state.gist_rows.cumsum(0) - state.gist_rows
        for layer in self.layers:
            rows = layer.gist.map(lambda t: t.transpose(1, 2)[owned.to(t.device)])
            # not a view: it would keep the original's rows in memory
            copy.layers.append(GistLayer.holding(rows, layer.tail.map(torch.clone), layer.dtype))
        return copy

    def fixed(self, room: int) -> FixedGistCache:
        """A copy with room for `room` tokens per sample behind the context, in buffers that never move or grow.

        For decoding under `torch.compile` and CUDA graphs (docs/guides/compiled-decoding.md), as a StaticCache is. Gist
        rows are copied as `shared` does; those of a shared cache are the same.

        Raises
        ------
        ValueError
            If the cache is empty, in float64 or on several devices, a segment of it is not ended, or it has more than
            `room` tokens behind its context already.
        """
        check_whole(self._call)
        return FixedGistCache.of(self, self._state(), self.first, self.read.ids(), self.layers, room)

    def reset(self) -> None:
        """Forget everything. ValueError for shared rows, which belong to all that share them."""
        if self.first is not None:
            raise ValueError("a shared cache is not reset: take a fresh clone, or share another cache")
        self.layers, self.state, self._call = [], None, None
        self.take_origin(Signed())
        self.read = TokensRead()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (transformers passes a negative count).

        Raises
        ------
        ValueError
            For a positive count, or where the tokens are not raw tail tokens of every sample.
        """
        if tokens_to_remove > 0 and CROP_TAKES_LENGTH:
            # before 5.1x assisted decoding passes how many of `generate`'s tokens stay
            tokens_to_remove = min(0, tokens_to_remove - self._state().fed)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove, got {tokens_to_remove}")
        if not tokens_to_remove:
            return
        check_whole(self._call)
        self.state = self._state().crop(-tokens_to_remove)
        self.read = self.read.crop(-tokens_to_remove)
        for layer in self.layers:
            layer.tail.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep samples `beam_idx`, in that order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples `indices`, in that order; shared rows are not moved."""
        check_whole(self._call)
        self.state, self.read = self._state().select(indices), self.read.select(indices)
        if self.first is not None:
            self.first = self.first[indices.to(self.first.device)]
        own = self.first is None
        self.layers = [layer.map(lambda t: t[indices.to(t.device)], gists=own) for layer in self.layers]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample `repeats` times, as `generate` repeats its inputs."""
        index = torch.arange(self.batch_size, device=self._state().seen.device)
        self.batch_select_indices(index.repeat_interleave(repeats))

    # ---- disk

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to one safetensors file, replacing it in one step. ValueError for a shared cache."""
        check_whole(self._call)
        state = self._state()
        if self.first is not None:
            raise ValueError("a shared cache is not saved: save the cache that shared() was called on")
        on_disk.save(path, self, state, self.read, self.layers)

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: PreTrainedModel | None = None, device: torch.device | str = "cpu"
    ) -> GistCache:
        """Read a cache written by `save`.

        With `model` (patched) the cache goes to its device and is checked against it now, otherwise at first use.

        Raises
        ------
        ValueError
            If the file is torn, is no gist cache, or was written by another model, position scheme or dtype.
        """
        place = check_device(device) if model is None else input_device(patched(model).inner)
        cache = cls()
        cache.state, cache.read, cache.layers = on_disk.load(path, cache, place)
        if model is not None:
            check_cache(cache, model)
        return cache
