"""`GistCache`: the compact gist rows and the uncompressed tail, as a transformers cache."""

from __future__ import annotations

import os
from collections.abc import Callable
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
from gistkern.cache.pool import PoolIntervals
from gistkern.cache.raw import RawSegments
from gistkern.cache.reader import Reader, patched
from gistkern.cache.restore import restored
from gistkern.cache.running import UNPATCHED, ModelCall, check_whole
from gistkern.cache.signed import Signed
from gistkern.cache.sizes import Sized
from gistkern.cache.step import Steps
from gistkern.cache.tokens_read import TokensRead
from gistkern.cache.versions import CROP_TAKES_LENGTH
from gistkern.layout import GistLayout
from gistkern.ops.attention import AttentionOptions
from gistkern.rows import LARGEST, check_gist_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

__all__ = ["GistCache"]


class GistCache(Signed, Sized, Cache):
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
    raw : RawSegments or None
        The raw rows of the context off the device, where `compress` kept them: what `restore` brings back.

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
        self.raw: RawSegments | None = None
        self.watch: Callable[..., None] | None = None  # sees each layer's queries and own rows
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
        if self.watch is not None:
            self.watch(layer, q, k, v, options)
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

    # ---- whole-cache operations

    def clone(self) -> GistCache:
        """An independent copy, so that one compressed context answers several questions. Shared rows stay shared."""
        copy = self._alike()
        copy.layers = [layer.map(torch.clone, gists=self.first is None) for layer in self.layers]
        return copy

    def __getstate__(self) -> dict[str, object]:
        """See `Signed`; for pickle and deepcopy."""
        check_whole(self._call)
        return super().__getstate__() | {"steps": Steps(), "_intervals": None, "watch": None}

    def _alike(self) -> GistCache:
        """A cache of the same state and origin, without layers."""
        check_whole(self._call)
        copy = type(self)()
        copy.take_origin(self)
        copy.state, copy.first, copy.read = self.state, self.first, TokensRead(self.read.ids())
        copy.raw = self.raw
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

    def restore(
        self,
        model: PreTrainedModel,
        question_ids: Any,
        top_k: int,
        *,
        attention_mask: torch.Tensor | None = None,
        scorer: str = "attention",
    ) -> GistCache:
        """A copy for one question, in which the raw rows of the segments that it is about stand behind the gist rows.

        Question and answer see those rows exactly as they were computed, at their own positions; the question is to be
        read over the copy as over any cache. This one stays as it is (docs/guides/exact-answers.md).

        Parameters
        ----------
        model : PreTrainedModel
            Patched: the one that wrote the cache.
        question_ids : Tensor, mapping or list
            int64 ``[B, N]``: a question for each sample, or several for the one sample that there is. Lists may differ
            in length.
        top_k : int
            Segments that come back for each sample; all of one that has fewer, and with 0 none.
        attention_mask : Tensor, optional
            ``[B, N]``, 0 on padding.
        scorer : str
            ``"attention"``: the question is read once over the gist rows, and a segment's score is what its gists get
            of the question's attention, on average over layers, heads and tokens. ``"bm25"``: the ids that question
            and segment share. ``"union"``: the best of either, up to twice `top_k`.

        Raises
        ------
        ValueError
            If the cache is empty, has a tail or holds no raw rows, these or the model are not those of its context,
            the file of the raw rows is torn, or an argument is none of the above. FileNotFoundError if it is gone.

        Examples
        --------
        >>> model, tokenizer, handle = gistkern.load("runs/mine")
        >>> context = tokenizer("The bell is with Mira. The lamp is with Jonas.")["input_ids"]
        >>> cache = gistkern.compress(model, context, segment_length=6, keep_raw="cpu")
        >>> question = tokenizer(" Who has the bell?", add_special_tokens=False, return_tensors="pt").input_ids
        >>> asked = cache.restore(model, question, top_k=1)
        >>> out = model.generate(question, past_key_values=asked, max_new_tokens=4, do_sample=False)
        """
        return restored(self, model, question_ids, top_k, attention_mask, scorer)

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
        self.layers, self.state, self._call, self.raw = [], None, None, None
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
        self.raw, self.cuts = None if self.raw is None else self.raw.select(indices), ()
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
        """Write the cache to one safetensors file, replacing it in one step.

        Raw rows are not in it: ``cache.raw.save(path)`` writes those to a file of their own. ValueError for a shared
        cache, and for the file that holds the raw rows.
        """
        check_whole(self._call)
        state = self._state()
        if self.first is not None:
            raise ValueError("a shared cache is not saved: save the cache that shared() was called on")
        on_disk.save(path, self, state, self.read, self.layers, self.raw)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel | None = None,
        device: torch.device | str = "cpu",
        *,
        raw: str | os.PathLike | None = None,
    ) -> GistCache:
        """Read a cache written by `save`.

        With `model` (patched) the cache goes to its device and is checked against it now, otherwise at first use.
        `raw` is the file with the raw rows of the same compression, which stay in it until `restore` wants some.

        Raises
        ------
        ValueError
            If a file is torn, is no gist cache, or was written by another model, position scheme or dtype, or the raw
            rows are of another context.
        """
        place = check_device(device) if model is None else input_device(patched(model).inner)
        cache = cls()
        cache.state, cache.read, cache.layers = on_disk.load(path, cache, place)
        if model is not None:
            check_cache(cache, model)
        if raw is not None:
            cache.raw = RawSegments.load(raw)
            cache.raw.check(cache, cache.state, cache.cuts)
        return cache
