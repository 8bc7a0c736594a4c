"""`GistCache`: the compact gist rows and the uncompressed tail, as a transformers cache."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from gistkern.cache.plan import CacheState, CallPlan
from gistkern.cache.tokens_read import UNKNOWN, ContextRead, TokensRead
from gistkern.cache.versions import CROP_TAKES_LENGTH

if TYPE_CHECKING:
    from collections.abc import Hashable

    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

    from gistkern.cache.reader import Reader
    from gistkern.cache.shared import SharedGistCache

__all__ = ["GistCache", "GistLayer"]

_UNPATCHED = "a GistCache works with a patched model only: call gistkern.patch_llama(model) first"


class GistLayer(DynamicLayer):
    """Keys and values of one layer, ``[B, Hkv, gist + tail, D]``; which rows those are is the cache's to know."""

    is_compileable = False

    @classmethod
    def holding(cls, keys: torch.Tensor, values: torch.Tensor) -> GistLayer:
        """A layer that has these rows already."""
        layer = cls()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        return layer

    def lazy_initialization(self, key_states, value_states=None):
        """Empty rows; written here because what transformers' own sets and takes differs between versions."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.new_empty(0), key_states.new_empty(0)
        self.is_initialized = True

    def update(self, key_states, value_states, plan: CallPlan, **kwargs):
        """Return all rows that this call may see; keep those that later calls may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        if key_states.dtype != self.dtype or key_states.device != self.device:
            raise ValueError(
                f"the cache holds {self.dtype} on {self.device}, the model computes {key_states.dtype} "
                f"on {key_states.device}: compress with the model that reads the cache, or use cache.to(...)"
            )
        visible = []
        for name, new in (("keys", key_states), ("values", value_states)):
            stored = getattr(self, name)
            rows = torch.cat([stored, new], dim=-2) if stored.numel() else new
            if plan.arrange is not None:
                rows = _take(rows, plan.arrange)
            setattr(self, name, rows if plan.keep is None else _take(rows, plan.keep))
            visible.append(rows)
        return tuple(visible)


def _take(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    index = columns.to(rows.device)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
    return rows.gather(2, index)


class GistCache(Cache):
    """A KV cache of gist rows and an uncompressed tail, for a model patched by `gistkern.patch_llama`.

    `gistkern.compress` makes one; ``model.generate(question_ids, past_key_values=cache.clone())`` reads it;
    the tokens passed to `generate` are those *after* the compressed context. An empty one streams: each
    ``model(ids, past_key_values=cache)`` appends, and a segment's raw rows are dropped once it is ended.

    Samples may own different numbers of rows (a ragged batch). The logical length (`get_seq_length`) counts
    every token that was read; the physical length (`get_mask_sizes`, `nbytes`) the rows that are stored.

    Attributes
    ----------
    layers : list of GistLayer
        Keys and values of each layer.
    state : CacheState
        Per-sample counts. None until the first call.
    positions : str
        Position scheme of the model that wrote the cache.
    read : TokensRead
        The tokens that were read after the compressed context.
    contexts : set of ContextRead
        Digests of the contexts that were compressed, of all samples.
    """

    layers: list[Any]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GistLayer)
        self.state: CacheState | None = None
        self.positions: str | None = None
        self.read = TokensRead()
        self.contexts: set[ContextRead] = set()
        self._fingerprint: str | None = None
        self._writer: tuple[weakref.ref[Reader], tuple[int, Hashable]] | None = None
        self._readers: weakref.WeakKeyDictionary[Reader, tuple[int, Hashable]] = weakref.WeakKeyDictionary()
        self._plan: CallPlan | None = None
        self._ids: torch.Tensor | None = None
        self._touched = False

    @classmethod
    def in_place_of(cls, cache: DynamicCache) -> GistCache:
        """An empty transformers cache as a GistCache: the same object, so that its owner holds what is read."""
        cache.__class__ = cls  # type: ignore[assignment]
        cache.__init__()  # type: ignore[misc]
        return cache  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        """Without the models that know it: a copy is checked again by its fingerprint."""
        state = dict(vars(self))
        state["_fingerprint"] = self.fingerprint
        return {name: value for name, value in state.items() if name not in ("_writer", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _writer=None, _readers=weakref.WeakKeyDictionary())

    def __repr__(self) -> str:
        name = type(self).__name__
        if self.state is None:
            return f"{name}(empty)"
        return (
            f"{name}(batch={self.batch_size}, tokens={self.get_seq_length()}, gist rows={self.gist_rows.tolist()}, "
            f"tail rows={self.tail_rows.tolist()}, {self.nbytes} bytes)"
        )

    # ---- one model call: begin, update layer by layer, commit

    def begin(self, plan: CallPlan, ids: torch.Tensor | None = None) -> None:
        """Use `plan` for the updates of the model call that follows, which brings `ids` (None: embeddings).

        Raises RuntimeError if the call before it failed after some layers had been updated.
        """
        if self._plan is not None and self._touched:
            raise RuntimeError(
                "an earlier model call failed half way through the layers and left this cache inconsistent: "
                "go on from a clone made before it, or compress again"
            )
        self._plan, self._ids, self._touched = plan, ids, False

    def commit(self) -> None:
        """End the model call: its plan's state becomes the cache's."""
        if self._plan is None:
            return
        layout, valid = self._plan.layout, None
        if self._ids is None:
            self._ids = torch.full((layout.batch_size, layout.num_rows), UNKNOWN, device=layout.device)
        if self._plan.has_padding:
            valid = layout.is_real()
        self.read.add(self._ids, valid)
        self.state, self._plan, self._ids = self._plan.after, None, None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by the attention layers. Raises RuntimeError outside a patched model's call."""
        if self._plan is None:
            raise RuntimeError(_UNPATCHED)
        self._touched = True
        while len(self.layers) <= layer_idx:
            self.layers.append(GistLayer())
        return self.layers[layer_idx].update(key_states, value_states, self._plan)

    # ---- who wrote it, and who may read it

    @property
    def fingerprint(self) -> str | None:
        """Identity of the model that wrote the cache; None if nobody knows it."""
        if self._fingerprint is None and self._writer is not None:
            handle, weights = self._writer[0](), self._writer[1]
            if handle is not None and handle.weights_in_use() == weights:
                self._fingerprint = handle.fingerprint()
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, value: str | None) -> None:
        self._fingerprint = value

    @property
    def is_signed(self) -> bool:
        """Whether a model wrote it (a cache that was filled by hand is nobody's)."""
        return self._writer is not None or self._fingerprint is not None

    def written_by(self, handle: Reader) -> None:
        """A patched model begins to write. Its fingerprint costs a look at all weights, so it waits until needed."""
        self.accept(handle)
        self._writer = weakref.ref(handle), self._readers[handle]
        self._fingerprint = None

    def accept(self, handle: Reader) -> None:
        """Remember that a model, with the weights and adapters it now uses, may read the cache."""
        self._readers[handle] = handle.weights_in_use()

    def knows(self, handle: Reader) -> bool:
        """Whether `accept` was called for the model with the adapters it now uses.

        And with its weights, if nothing has been asked yet: they take longer to go through than a decode step may.
        """
        known = self._readers.get(handle)
        if known is None or (self.state is not None and self.state.tail_columns):
            return known is not None and known[1] == handle.adapters_in_use()
        return known == handle.weights_in_use()

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
        """Bytes of the stored keys and values."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def compact(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[B, Hkv, G, D]`` of the compact rows of a layer; samples that own fewer have the last."""
        columns = self._state().gist_columns
        return self.layers[layer].keys[:, :, :columns], self.layers[layer].values[:, :, :columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens read so far by the longest sample."""
        return 0 if self.state is None else self.state.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Physical length with `query_length` new rows, and offset 0."""
        if query_length < 1:  # an unpatched model cuts a context off that the question does not hold
            raise RuntimeError(_UNPATCHED)
        if self.state is None:
            return query_length, 0
        return self.state.gist_columns + self.state.tail_columns + query_length, 0

    def _state(self) -> CacheState:
        if self.state is None:
            raise ValueError("the cache is empty: no model call has written to it yet")
        return self.state

    def without_tail(self, advice: str) -> CacheState:
        """The state of a compressed context; ValueError, ending in `advice`, where there is none or more than that."""
        if self.state is None:
            raise ValueError("the cache is empty: compress a context first")
        if self.state.tail_columns:
            raise ValueError(f"the cache has an uncompressed tail: {advice}")
        return self.state

    # ---- whole-cache operations

    def clone(self) -> GistCache:
        """An independent copy, so that one compressed context answers several questions."""
        copy = self._alike()
        copy.layers = [_copy_layer(layer, torch.clone) for layer in self.layers]
        return copy

    def _alike(self) -> GistCache:
        """A cache of the same state and origin, without layers."""
        copy = type(self)()
        copy.take_origin(self)
        copy.state, copy.read = self.state, TokensRead(self.read.ids())
        return copy

    def take_origin(self, other: GistCache) -> None:
        """What was compressed, how and by whom, from another cache."""
        self.positions, self.contexts = other.positions, set(other.contexts)
        self._fingerprint, self._writer = other._fingerprint, other._writer
        self._readers = weakref.WeakKeyDictionary(other._readers)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> GistCache:
        """The cache on another device or in another dtype: a copy, or itself where nothing changes, as of a tensor.

        Within a model's call it is always itself: each layer's rows are where that layer is.
        """
        place = None if device is None else torch.empty(0, device=device).device  # of "cuda": its current one
        same = all(t.device == (place or t.device) and t.dtype == (dtype or t.dtype) for t in self._tensors())
        if same or self._plan is not None:
            return self
        copy = self._alike()
        copy.layers = [
            _copy_layer(layer, lambda t: t.to(device=device, dtype=dtype, non_blocking=non_blocking))
            for layer in self.layers
        ]
        copy.read = copy.read.to(device)
        if device is not None and copy.state is not None:
            moved: dict[str, Any] = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(copy.state).items()}
            copy.state = CacheState(**moved)
        return copy

    def _tensors(self) -> list[torch.Tensor]:
        """Keys and values of all layers."""
        return [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]

    def shared(self) -> SharedGistCache:
        """A copy whose rows stand once in memory, however many questions, answers or beams read them.

        Raises
        ------
        ValueError
            If the cache is empty or has a tail.
        """
        from gistkern.cache.shared import share

        return share(self)

    def reset(self) -> None:
        """Forget everything."""
        self.layers, self.state, self._plan = [], None, None
        self.take_origin(GistCache())
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
        self.state = self._state().crop(-tokens_to_remove)
        self.read = self.read.crop(-tokens_to_remove)
        for layer in self.layers:
            layer.keys = layer.keys[..., :tokens_to_remove, :]
            layer.values = layer.values[..., :tokens_to_remove, :]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep samples `beam_idx`, in that order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples `indices`, in that order."""
        self.state, self.read = self._state().select(indices), self.read.select(indices)
        for layer in self.layers:
            layer.keys, layer.values = (t[indices.to(t.device)] for t in (layer.keys, layer.values))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample `repeats` times, as `generate` repeats its inputs."""
        index = torch.arange(self.batch_size, device=self._state().seen.device)
        self.batch_select_indices(index.repeat_interleave(repeats))

    def take_columns(self, columns: torch.Tensor) -> None:
        """Replace the stored columns by those listed per sample (int64 ``[B, gist + tail columns]``)."""
        for layer in self.layers:
            layer.keys, layer.values = _take(layer.keys, columns), _take(layer.values, columns)

    # ---- disk

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to one safetensors file, replacing it in one step."""
        from gistkern.cache.file import save

        save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: PreTrainedModel | None = None, device: torch.device | str = "cpu"
    ) -> GistCache:
        """Read a cache written by `save`.

        With `model` (patched) the cache goes to its device and is checked against it now, otherwise at
        first use.

        Raises
        ------
        ValueError
            If the file is torn, is no gist cache, or was written by another model, position scheme or dtype.
        """
        from gistkern.cache.file import load

        return load(path, model, device)


def _copy_layer(layer: GistLayer, function) -> GistLayer:
    return GistLayer.holding(function(layer.keys), function(layer.values)) if layer.is_initialized else GistLayer()
