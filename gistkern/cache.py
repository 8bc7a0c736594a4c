"""`GistCache`: the compact gist rows and the uncompressed tail, as a transformers cache."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from gistkern.cache_plan import CacheState, CallPlan
from gistkern.versions import CROP_TAKES_LENGTH

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gistkern.shared_cache import SharedGistCache

__all__ = ["GistCache", "GistLayer"]


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
    index = columns[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
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
    fingerprint : str
        Identity of that model, set by `compress`.
    unchecked : bool
        Whether the cache was loaded without its model; it is then checked when first used.
    """

    layers: list[Any]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GistLayer)
        self.state: CacheState | None = None
        self.positions: str | None = None
        self.fingerprint: str | None = None
        self.unchecked = False
        self._plan: CallPlan | None = None
        self._touched = False

    def __repr__(self) -> str:
        name = type(self).__name__
        if self.state is None:
            return f"{name}(empty)"
        return (
            f"{name}(batch={self.batch_size}, tokens={self.get_seq_length()}, gist rows={self.gist_rows.tolist()}, "
            f"tail rows={self.tail_rows.tolist()}, {self.nbytes} bytes)"
        )

    # ---- one model call: begin, update layer by layer, commit

    def begin(self, plan: CallPlan) -> None:
        """Use `plan` for the updates of the model call that follows.

        Raises RuntimeError if the call before it failed after some layers had been updated.
        """
        if self._plan is not None and self._touched:
            raise RuntimeError(
                "an earlier model call failed half way through the layers and left this cache inconsistent: "
                "go on from a clone made before it, or compress again"
            )
        self._plan, self._touched = plan, False

    def commit(self) -> None:
        """End the model call: its plan's state becomes the cache's."""
        if self._plan is not None:
            self.state, self._plan = self._plan.after, None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by the attention layers. Raises RuntimeError outside a patched model's call."""
        if self._plan is None:
            raise RuntimeError("a GistCache works with a patched model only: call gistkern.patch_llama(model) first")
        self._touched = True
        while len(self.layers) <= layer_idx:
            self.layers.append(GistLayer())
        return self.layers[layer_idx].update(key_states, value_states, self._plan)

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
        return sum(t.nbytes for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values))

    def compact(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[B, Hkv, G, D]`` of the compact rows of a layer; samples that own fewer have the last."""
        columns = self._state().gist_columns
        return self.layers[layer].keys[:, :, :columns], self.layers[layer].values[:, :, :columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens read so far by the longest sample."""
        return 0 if self.state is None else self.state.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Physical length with `query_length` new rows, and offset 0."""
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
        copy = type(self)()
        copy.positions, copy.fingerprint, copy.state = self.positions, self.fingerprint, self.state
        copy.unchecked = self.unchecked
        copy.layers = [_copy_layer(layer, torch.clone) for layer in self.layers]
        return copy

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GistCache:
        """A copy on another device or in another dtype."""
        copy = self.clone()
        copy.layers = [_copy_layer(layer, lambda t: t.to(device=device, dtype=dtype)) for layer in copy.layers]
        if device is not None and copy.state is not None:
            moved: dict[str, Any] = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(copy.state).items()}
            copy.state = CacheState(**moved)
        return copy

    def shared(self) -> SharedGistCache:
        """A copy whose rows stand once in memory, however many questions, answers or beams read them.

        Raises
        ------
        ValueError
            If the cache is empty or has a tail.
        """
        from gistkern.shared_cache import share

        return share(self)

    def reset(self) -> None:
        """Forget everything."""
        self.layers, self.state, self._plan = [], None, None
        self.positions = self.fingerprint = None

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
        for layer in self.layers:
            layer.keys = layer.keys[..., :tokens_to_remove, :]
            layer.values = layer.values[..., :tokens_to_remove, :]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep samples `beam_idx`, in that order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples `indices`, in that order."""
        self.state = self._state().select(indices)
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
        from gistkern.cache_file import save

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
        from gistkern.cache_file import load

        return load(path, model, device)


def _copy_layer(layer: GistLayer, function) -> GistLayer:
    return GistLayer.holding(function(layer.keys), function(layer.values)) if layer.is_initialized else GistLayer()
