"""A model call over a cache of fixed size, planned on the device: every call of so many tokens is the same program."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from gistkern.cache.fixed_layer import Piece
from gistkern.cache.windows import Windows, check_window
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.ops.attention import AttentionOptions

__all__ = ["FixedCall"]


class Held(Protocol):
    """What a call asks of its cache (`FixedGistCache`)."""

    layers: list[Any]
    room: int
    capacity: int
    gist_begin: torch.Tensor
    gist_end: torch.Tensor
    tail_position: torch.Tensor
    length: torch.Tensor


class FixedCall:
    """A model call: where its rows go, and what they see."""

    def __init__(
        self,
        cache: Held,
        ids: torch.Tensor | None,
        valid: torch.Tensor | None,
        rows: int,
        windows: Windows,
        backend: str,
    ) -> None:
        """Of `rows` tokens per sample; `valid` (bool ``[B, N]``) is false on padding, in front of the others."""
        before, room, device = cache.length, cache.room, cache.length.device
        self.cache, self.ids, self.rows, self.windows, self.backend = cache, ids, rows, windows, backend
        if valid is None:
            place = torch.arange(rows, device=device).expand(len(before), -1)
            after = before + rows
        else:
            place = valid.long().cumsum(1) - 1
            after = before + valid.sum(1, dtype=torch.int32)
        torch._assert_async((after <= room).all(), "the cache of fixed size has no room for this call's rows")
        # row `room` is nobody's: whatever is counted, nothing is written behind it
        target = (before[:, None] + place).clamp(max=room)
        self.position_ids = cache.tail_position[:, None] + target
        if valid is not None:
            self.position_ids = self.position_ids.masked_fill(~valid, 0)
            target = target.masked_fill(~valid, room)
        self.target, self.after, self.valid = target, after.clamp(max=room), valid
        self._pieces: dict[int | None, list[Piece]] = {}  # by window

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        window: int | None,
        learned_sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Output ``[B, Hq, N, D]`` of one layer, of the call's own rows of queries, keys and values."""
        check_window(layer, self.windows[layer], window)
        if torch.is_autocast_enabled(v.device.type):  # the rotation promotes queries and keys to fp32
            q, k = q.to(v.dtype), k.to(v.dtype)
        if window not in self._pieces:
            self._pieces[window] = [
                self._piece(window, begin, min(begin + DECODE_ROWS, self.rows))
                for begin in range(0, self.rows, DECODE_ROWS)
            ]
        options = AttentionOptions(scale, self.backend, learned_sinks)
        held = self.cache.layers[layer]
        return held.attend(q, k, v, self.target, self._pieces[window], self.cache.capacity, options)

    def _piece(self, window: int | None, begin: int, end: int) -> Piece:
        """What query rows ``[begin, end)`` see: all gist rows, and tail rows up to their own or its `window` last."""
        cache, length, local_begin = self.cache, self.after, None
        gist_begin, gist_end = cache.gist_begin, cache.gist_end
        if end < self.rows:
            length = (length - (self.rows - end)).clamp(min=0)
        if window is not None:
            local_begin = (self.target[:, begin:end] - (window - 1)).clamp(min=0).int()
        if self.valid is not None:  # padding sees nothing
            shown = self.valid[:, begin:end]
            gist_begin = cache.gist_begin[:, None].expand_as(shown)
            gist_end = torch.where(shown, cache.gist_end[:, None], gist_begin)
            least = torch.zeros_like(gist_begin) if local_begin is None else local_begin
            local_begin = least.masked_fill(~shown, cache.room + 1)
        return Piece(begin, end, gist_begin, gist_end, length, local_begin)
