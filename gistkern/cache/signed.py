"""Which model wrote a cache, and which may read it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

    from gistkern.cache.reader import Reader
    from gistkern.cache.tokens_read import ContextRead

__all__ = ["Signed"]


class Signed:
    """What a cache knows of its origin: position scheme, contexts, model."""

    def __init__(self) -> None:
        self.positions: str | None = None
        self.contexts: set[ContextRead] = set()
        self.cuts: tuple[str, ...] = ()  # of a cache that a file was read into: `RawSegments.cuts` of its raw rows
        self._fingerprint: str | None = None
        self._writer: tuple[weakref.ref[Reader], tuple[int, Hashable]] | None = None
        self._readers: weakref.WeakKeyDictionary[Reader, tuple[int, Hashable]] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, object]:
        """Without the models that know it: a copy is checked again by its fingerprint."""
        state = dict(vars(self))
        state["_fingerprint"] = self.fingerprint
        return {name: value for name, value in state.items() if name not in ("_writer", "_readers")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _writer=None, _readers=weakref.WeakKeyDictionary())

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

    def accepted(self, handle: Reader, anew: bool) -> bool:
        """Whether `accept` was called for the model with the adapters it now uses.

        And, `anew`, with its weights: they take longer to go through than a decode step may.
        """
        known = self._readers.get(handle)
        if known is None or not anew:
            return known is not None and known[1] == handle.adapters_in_use()
        return known == handle.weights_in_use()

    def take_origin(self, other: Signed) -> None:
        """What was compressed, how and by whom, from another cache."""
        self.positions, self.contexts, self.cuts = other.positions, set(other.contexts), other.cuts
        self._fingerprint, self._writer = other._fingerprint, other._writer
        self._readers = weakref.WeakKeyDictionary(other._readers)
