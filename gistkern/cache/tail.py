"""The tail of one layer: raw rows, which grow by what each call brings."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gistkern.cache.plan import Kept
from gistkern.rows import gather_rows

__all__ = ["TailRows"]

_LEAST_ROOM = 16


class TailRows:
    """Keys and values ``[B, Hkv, T, D]`` that grow at their end.

    Rows of a model call without gradients are written into room behind those that are there, which doubles where it is
    full: a decode step writes one row. Views that were handed out stay what they are until `kept` takes rows back.
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = key, value
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None  # whose first T rows are key and value

    def __getstate__(self) -> dict[str, torch.Tensor | None]:
        """Copies of the rows, without the room."""
        return {"key": self.key.clone(), "value": self.value.clone(), "_room": None}

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values."""
        return self.key, self.value

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TailRows:
        """Rows of what `function` makes of keys and values. Whoever writes behind them has room of its own."""
        return TailRows(function(self.key), function(self.value))

    def extended(self, key: torch.Tensor, value: torch.Tensor, in_place: bool) -> TailRows:
        """A tail with rows ``[B, Hkv, N, D]`` behind those that are here, which takes the place of this one.

        `in_place` unless a graph may have saved the rows: then they are in the same memory, and so is the room.
        """
        mine, room = self.key, self._room
        rows, more = mine.shape[2], key.shape[2]
        if not rows:
            return TailRows(key, value)
        if not in_place or key.dtype != mine.dtype or mine.requires_grad:
            return TailRows(torch.cat([mine, key], 2), torch.cat([self.value, value], 2))
        # outside inference mode nobody may write into what was made inside
        if (
            room is None
            or room[0].shape[2] < rows + more
            or (room[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            room = self._copied(max(2 * (rows + more), _LEAST_ROOM))
        keys, values = room
        keys.narrow(2, rows, more).copy_(key)
        values.narrow(2, rows, more).copy_(value)
        longer = TailRows(keys.narrow(2, 0, rows + more), values.narrow(2, 0, rows + more))
        longer._room = room
        return longer

    def _copied(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for `capacity` rows with those that are there in front."""
        rows, new = self.key.shape[2], []
        for tensor in (self.key, self.value):
            room = tensor.new_empty((*tensor.shape[:2], capacity, tensor.shape[3]))
            room.narrow(2, 0, rows).copy_(tensor)
            new.append(room)
        return new[0], new[1]

    def take(self, index: torch.Tensor) -> None:
        """The rows that `index` lists for each sample, int64 ``[B, T]``, in place of all."""
        index = index.to(self.key.device)
        self.key, self.value, self._room = gather_rows(self.key, index), gather_rows(self.value, index), None

    def keep(self, kept: Kept) -> None:
        """Drop the rows that no later call may see."""
        if isinstance(kept, torch.Tensor):
            self.take(kept)
        elif kept is not None and kept.start == kept.stop:
            shape = (*self.key.shape[:2], 0, self.key.shape[3])
            self.key, self.value, self._room = self.key.new_empty(shape), self.value.new_empty(shape), None
        elif kept is not None:  # a run of them
            # copied: a view would hold the others in memory
            self.key, self.value = (t[:, :, kept].clone() for t in (self.key, self.value))
            self._room = None

    def crop(self, count: int) -> None:
        """Take back the last `count` rows; the next ones are written in their place."""
        rows = self.key.shape[2] - count
        self.key, self.value = self.key.narrow(2, 0, rows), self.value.narrow(2, 0, rows)
