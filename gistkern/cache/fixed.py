"""`FixedGistCache`: gist rows and a tail of fixed size, to compile (docs/guides/compiled-decoding.md)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from gistkern.cache.fixed_call import FixedCall
from gistkern.cache.fixed_layer import FixedLayer, fixed_address
from gistkern.cache.plan import CacheState
from gistkern.cache.reader import Reader
from gistkern.cache.running import UNPATCHED
from gistkern.cache.signed import Signed
from gistkern.cache.tokens_read import UNKNOWN, RowsRead
from gistkern.cache.versions import CROP_TAKES_LENGTH
from gistkern.cache.windows import Windows

__all__ = ["FixedGistCache"]

# what there is of each sample, beside the rows
_SAMPLES = ("gist_begin", "gist_end", "tail_position", "seen", "length", "ids")


class FixedGistCache(Signed, Cache):
    """A compressed context and room for `room` rows behind it, in buffers that never move: for `torch.compile`.

    Made by `GistCache.fixed`. A patched model reads it as any GistCache, and a call of one token is then the same
    program every time: `generate` compiles it where it would with a StaticCache, and CUDA graphs replay it.

    Attributes
    ----------
    layers : list of FixedLayer
        Gist rows and the tail's buffers of each layer.
    room : int
        Tokens that a sample can have behind the context.
    length : Tensor
        int32 ``[B]``: how many it has.
    ids : Tensor
        int64 ``[B, room + 1]``: which.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    ...                      vocab_size=100)
    >>> model = LlamaForCausalLM(config).eval()
    >>> handle = patch(model, num_gist_tokens=2)
    >>> fixed = compress(model, torch.arange(1, 30)[None]).fixed(room=12)
    >>> for question in torch.tensor([[[5, 6, 7]], [[8, 9, 10]]]):
    ...     fixed.reset_tail()
    ...     answer = model.generate(question, past_key_values=fixed, max_new_tokens=9)
    >>> fixed
    FixedGistCache(batch=1, gist rows=[3], tail rows=[11] of 12, 4096 bytes)
    """

    layers: list[Any]
    is_compileable = True
    is_croppable = True

    def __init__(
        self, layers: list[FixedLayer], origin: Signed, samples: dict[str, torch.Tensor], fed: torch.Tensor, room: int
    ) -> None:
        Cache.__init__(self, layers=layers)  # type: ignore[arg-type]
        Signed.__init__(self)
        self.take_origin(origin)
        self.room = room
        self.gist_begin, self.gist_end, self.tail_position, self.seen, self.length, self.ids = map(
            fixed_address, (samples[name] for name in _SAMPLES)
        )
        self.fed = fixed_address(fed)
        self.capacity = int((self.gist_end - self.gist_begin).max())  # a bound for kernels, asked of the device once
        self._call: FixedCall | None = None
        self._used: int | None = None  # rows of the longest sample, None where the device has to be asked
        self._padding: int | None = None  # columns that `generate` counts and no sample has a row for
        self._announced: torch.Tensor | None = None
        writer = self._writer and self._writer[0]()
        known = writer is not None and self._readers.get(writer) == writer.weights_in_use()
        self._reader: weakref.ref[Reader] | None = weakref.ref(writer) if writer is not None and known else None

    @classmethod
    def of(
        cls,
        origin: Signed,
        state: CacheState,
        first: torch.Tensor | None,
        read: torch.Tensor | None,
        layers: list[Any],
        room: int,
    ) -> FixedGistCache:
        """See `GistCache.fixed`; the arguments are that cache's."""
        if isinstance(room, bool) or not isinstance(room, int) or room < 1:
            raise ValueError(f"room is a number of tokens, at least 1, got {room!r}")
        if state.tail_has_gists or state.moving:
            raise ValueError("a segment of the cache is not ended: end it with its gist tokens, or compress")
        if state.tail_columns > room:
            raise ValueError(f"the cache has {state.tail_columns} rows behind its context already, room is {room}")
        dtype = layers[0].tail.key.dtype
        if dtype == torch.float64:
            raise ValueError("a cache of fixed size is read by kernels for float16, bfloat16 and float32, not float64")
        if len(places := {layer.tail.key.device for layer in layers}) > 1:
            raise ValueError(f"a cache of fixed size is on one device, these layers on {sorted(map(str, places))}")
        device = layers[0].tail.key.device
        with torch.inference_mode(False), torch.no_grad():  # what is made inside cannot be written outside
            state = state.on(device)
            owned = state.owned_gists() if first is None else None
            begin = (state.gist_rows.cumsum(0) - state.gist_rows) if first is None else first.to(device)
            ids = torch.full((len(begin), room + 1), UNKNOWN, device=device)
            if read is not None:
                RowsRead.write(ids, read.to(device), room)
            samples = {
                "gist_begin": begin.int(),
                "gist_end": (begin + state.gist_rows).int(),
                "tail_position": state.tail_position.clone(),
                "seen": state.seen - state.tail_rows,
                "length": state.tail_rows.int(),
                "ids": ids,
            }
            fixed = [FixedLayer.of(layer, owned, state.tail_rows, room) for layer in layers]
            return cls(fixed, origin, samples, torch.tensor(state.fed, device=device), room)

    def __repr__(self) -> str:
        rows = f"gist rows={(self.gist_end - self.gist_begin).tolist()}, tail rows={self.length.tolist()}"
        return f"FixedGistCache(batch={self.batch_size}, {rows} of {self.room}, {self.nbytes} bytes)"

    # ---- one model call: begin, attend layer by layer, commit

    def announce(self, ids: torch.Tensor) -> None:
        """The call to come brings this very tensor ``[B, 1]``: a raw token for each sample, for which there is room."""
        self._announced = ids

    def is_announced(self, ids: torch.Tensor) -> bool:
        """Whether the call that brings `ids` was announced; asked once."""
        announced, self._announced = self._announced, None
        return ids is announced and ids.shape[0] == self.length.shape[0]

    def begin(
        self,
        ids: torch.Tensor | None,
        valid: torch.Tensor | None,
        rows: int,
        windows: Windows,
        backend: str,
        counted: bool = False,
    ) -> FixedCall:
        """The model call that follows, of `rows` tokens (see `FixedCall`). Nothing waits for the device."""
        self._call = FixedCall(self, ids, valid, rows, windows, backend, counted)
        return self._call

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """The call's own rows, as they came: attention stores them. RuntimeError outside a patched model's call."""
        if self._call is None:
            raise RuntimeError(UNPATCHED)
        return key_states, value_states

    def commit(self) -> None:
        """End the model call: its rows are the cache's."""
        call = self._call
        if call is None:
            return
        ids = torch.full_like(call.target, UNKNOWN) if call.ids is None else call.ids
        self.ids.scatter_(1, call.target, ids if ids.dtype == torch.int64 else ids.long())
        self.length.copy_(call.after)
        self.fed.add_(call.rows)
        # a compiled call must not depend on what the host has counted
        unknown = call.valid is not None or (not call.counted and torch.compiler.is_compiling())
        counted = None if unknown else self._used
        self._used = None if counted is None else counted + call.rows
        self._call = None

    def abandon(self) -> None:
        """End a model call that failed: its rows stand behind those that count."""
        self._call = None

    def is_known_to(self, handle: Reader) -> bool:
        """Whether this model may read the cache, asked while a call is compiled: it wrote it, or has read it before."""
        return self._reader is not None and self._reader() is handle

    def knows(self, handle: Reader) -> bool:
        """Whether a model may read the cache: asked of its weights at the first question only."""
        return self.accepted(handle, anew=self._used == 0)

    def accept(self, handle: Reader) -> None:
        """See `Signed.accept`."""
        super().accept(handle)
        self._reader = weakref.ref(handle)

    # ---- room

    def used(self) -> int:
        """Tail rows of the longest sample. Waits for the device after compiled calls and padded ones."""
        if self._used is None:
            self._used = int(self.length.max())
        return self._used

    def require(self, rows: int, valid: torch.Tensor | None = None) -> None:
        """ValueError unless there is room for so many more tokens, of which `valid` (bool ``[B, N]``) count."""
        after = self.used() + rows if valid is None else int((self.length + valid.sum(1)).max())
        if after > self.room:
            raise ValueError(
                f"the cache has room for {self.room} tokens behind its context, this call would make them {after}: "
                "take cache.fixed(room=...) with more, or reset_tail() before another question"
            )

    def counts(self, columns: int | None) -> None:
        """Before a call of `generate`, which has given the model so many columns by now: no need to ask the device.

        None before the first: columns that are padding are counted then.
        """
        if columns is None:
            self._padding = None
        elif self._padding is None:
            self._padding = columns - self.used()
        else:
            self._used = columns - self._padding

    # ---- sizes

    @property
    def batch_size(self) -> int:
        """Samples in the cache."""
        return len(self.length)

    @property
    def gist_rows(self) -> torch.Tensor:
        """int64 ``[B]``: compact rows (gists and sinks) of each sample."""
        return (self.gist_end - self.gist_begin).long()

    @property
    def tail_rows(self) -> torch.Tensor:
        """int64 ``[B]``: uncompressed rows of each sample."""
        return self.length.long()

    @property
    def nbytes(self) -> int:
        """Bytes of gist rows and of the buffers for tails, whether filled or not."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """What the model that reads the cache computes in."""
        return self.layers[0].tail.key.dtype

    def shape(self) -> set[tuple[int, int, int]]:
        """Layers, key/value heads and width."""
        return {(len(self.layers), *layer.tail.key.shape[1::2]) for layer in self.layers}

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Logical length: tokens read so far by the longest sample; a tensor, as StaticCache gives one."""
        return (self.seen + self.length).max()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Physical length with all room, and offset 0."""
        return self.capacity + self.room, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a sample can have behind the context."""
        return self.room

    get_max_cache_shape = get_max_length  # its name until transformers 5.1x

    @property
    def state(self) -> CacheState:
        """The counts, as a GistCache holds them. Waits for the device."""
        tail = self.used()
        return CacheState(
            seen=self.seen + self.length,
            gist_rows=self.gist_rows,
            tail_rows=self.tail_rows,
            tail_position=self.tail_position,
            tail_is_gist=self.ids.new_zeros((self.batch_size, tail), dtype=torch.bool),
            gist_columns=self.capacity,
            tail_columns=tail,
            length=int(self.get_seq_length()),
            fed=int(self.fed),
        )

    @property
    def read(self) -> RowsRead:
        """The tokens that were read after the compressed context."""
        return RowsRead(self.ids, self.length, int(self.fed))

    # ---- whole-cache operations

    def clone(self) -> FixedGistCache:
        """An independent copy with buffers of its own. Gist rows, which nobody writes, are the same."""
        return self._copied(torch.clone)

    def reset_tail(self) -> None:
        """Forget what came after the context, in place: the next question, for the same compiled program."""
        self.length.zero_()
        self.fed.zero_()
        self._call, self._used = None, 0

    def reset(self) -> None:
        """ValueError: the context belongs to the cache. `reset_tail` forgets what came after it."""
        raise ValueError("a cache of fixed size keeps its context: reset_tail() forgets what came after it")

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (transformers passes a negative count), in place.

        Raises
        ------
        ValueError
            For a positive count, or for more than a sample has behind the context.
        """
        if tokens_to_remove > 0 and CROP_TAKES_LENGTH:
            tokens_to_remove = min(0, tokens_to_remove - int(self.fed))
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to remove, got {tokens_to_remove}")
        if not tokens_to_remove:
            return
        if -tokens_to_remove > (least := int(self.length.min())):
            raise ValueError(
                f"cannot crop {-tokens_to_remove} tokens: only the {least} raw tokens after the compressed context can "
                "be taken back, the context itself is gone"
            )
        self.length.add_(tokens_to_remove)
        self.fed.add_(tokens_to_remove)
        self._used = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep samples `beam_idx`, in that order (beam search), in the same buffers."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples `indices`, in that order: in the same buffers where there are as many, else in new ones."""
        index = indices.to(self.length.device)
        if len(index) != self.batch_size:
            vars(self).update(vars(self._copied(lambda t: t.index_select(0, index))))
            return
        for layer in self.layers:
            layer.reorder(index)
        for name in _SAMPLES:
            held = getattr(self, name)
            held.copy_(held.index_select(0, index))
        self._used = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample `repeats` times, as `generate` repeats its inputs; in new buffers."""
        index = torch.arange(self.batch_size, device=self.length.device)
        self.batch_select_indices(index.repeat_interleave(repeats))

    def _copied(self, function: Callable[[torch.Tensor], torch.Tensor]) -> FixedGistCache:
        """A cache of what `function` makes of tails and counts."""
        with torch.inference_mode(False), torch.no_grad():
            samples = {name: function(getattr(self, name)) for name in _SAMPLES}
            layers = [layer.copied(function) for layer in self.layers]
            copy = FixedGistCache(layers, self, samples, self.fed.clone(), self.room)
        copy._reader, copy._used = self._reader, self._used
        return copy

    def __getstate__(self) -> dict[str, object]:
        """See `Signed`; for deepcopy."""
        return {**super().__getstate__(), "_call": None, "_reader": None, "_announced": None}
