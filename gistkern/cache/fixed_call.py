"""A model call over a cache of fixed size, planned on the device: every call of so many tokens is the same program."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from gistkern.cache.fixed_layer import Piece
from gistkern.cache.windows import Windows, check_window
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.ops.attention import AttentionOptions
from gistkern.ops.decode import Seen

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
        counted: bool = False,
    ) -> None:
        """Of `rows` tokens per sample; `valid` (bool ``[B, N]``) is false on padding, in front of the others.

        `counted`: one token, for which the host knows that there is room; else the device looks.
        """
        self.cache, self.ids, self.rows, self.windows, self.backend = cache, ids, rows, windows, backend
        self.valid, self.counted = valid, counted
        self._pieces: dict[int | None, list[Piece]] = {}  # by window
        self._index: torch.Tensor | None = None  # where rows go, as the layer before needed it, and of which shape
        self._shape: torch.Size | None = None
        self._options: AttentionOptions | None = None  # of the layer before, and mostly of all
        if counted:
            self.target, self.after = cache.length[:, None].long(), cache.length + 1
            self.position_ids = cache.tail_position[:, None] + self.target
            return
        before, room, device = cache.length, cache.room, cache.length.device
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
        self.target, self.after = target, after.clamp(max=room)

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
        # every line is run by every layer of every decode step: nothing is called that an attribute answers
        if window != self.windows[layer]:
            check_window(layer, self.windows[layer], window)
        if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(v.device.type):
            q, k = q.to(v.dtype), k.to(v.dtype)  # which the rotation has promoted to fp32
        if window not in self._pieces:
            self._pieces[window] = [
                self._piece(window, begin, min(begin + DECODE_ROWS, self.rows))
                for begin in range(0, self.rows, DECODE_ROWS)
            ]
        options, index, cache = self._options, self._index, self.cache
        if options is None or scale != options.scale or learned_sinks is not options.learned_sinks:
            options = self._options = AttentionOptions(scale, self.backend, learned_sinks)
        if index is None or self._shape != k.shape:
            index = self._index = self.target[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            self._shape = k.shape
        return cache.layers[layer].attend(q, k, v, index, self._pieces[window], cache.capacity, options)

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
        return Piece(begin, end, Seen.of(end - begin, gist_begin, gist_end, length, local_begin))
