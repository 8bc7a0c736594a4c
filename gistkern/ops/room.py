"""Room behind the past rows: new compact rows are written there, and nothing of the past ones is copied.

A cache that grows call by call keeps a buffer that is longer than its rows. What a call compacts lands behind them, and
attention reads both where they stand.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from gistkern.layout import GistLayout
from gistkern.ops import checks

__all__ = ["Room", "check_room", "compact_behind", "has_room", "room_key"]

Room = tuple[torch.Tensor, torch.Tensor]


def has_room(room: Any, layout: GistLayout) -> bool:
    """Whether the call's new rows fit behind the past ones; a call without new rows needs none."""
    new = layout.gather.shape[1]
    if not new:
        return False
    try:
        key, value = room
        return layout.past + new <= key.shape[2] and layout.past + new <= value.shape[2]
    except (AttributeError, IndexError, TypeError, ValueError):
        return True  # no buffers: `check_room` says so


def room_key(room: Room, past_k: torch.Tensor | None, past_v: torch.Tensor | None) -> tuple[Any, ...]:
    """All that `check_room` looks at beside tensors that are in a plan's key anyway."""
    # asked at every layer of a cache that grows
    key, value = room
    of_key, of_value = key.data_ptr(), value.data_ptr()
    same = True
    if past_k is not None and past_v is not None:
        same = (past_k.data_ptr(), past_v.data_ptr()) in ((of_key, of_value), (0, 0))  # 0: of empty tensors
    return (
        *(key.__class__, key.shape, key.stride(), key.dtype, key.device, key.requires_grad, key.is_neg()),
        *(value.__class__, value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_neg()),
        *(same, of_key == of_value),
    )


def check_room(
    room: Any, k: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, layout: GistLayout
) -> None:
    """Raise ValueError unless `room` holds the past rows, and is buffers that the new ones may be written to."""
    if not isinstance(room, (tuple, list)) or len(room) != 2 or not type(room[0]) is type(room[1]) is torch.Tensor:
        raise ValueError("room must be a pair of plain tensors, for keys and for values")
    batch, heads, _, dim = k.shape
    for name, buffer in zip(("key", "value"), room, strict=True):
        if buffer.ndim != 4 or (*buffer.shape[:2], buffer.shape[3]) != (batch, heads, dim):
            raise ValueError(f"room's {name}s must be [{batch}, {heads}, rows, {dim}], got {tuple(buffer.shape)}")
        if buffer.dtype != k.dtype or buffer.device != k.device:
            raise ValueError(f"room's {name}s are {buffer.dtype} on {buffer.device}, k {k.dtype} on {k.device}")
        if not buffer.is_contiguous() or buffer.is_neg() or buffer.requires_grad:
            raise ValueError(f"room's {name}s must be contiguous memory as torch.empty makes it, and not learn")
    if (
        room[0].shape != room[1].shape
        or room[0].stride() != room[1].stride()
        or room[0].data_ptr() == room[1].data_ptr()
    ):
        raise ValueError("room's keys and values must lie alike in memory, and not in the same place")
    for past, buffer in zip((past_k, past_v), room, strict=True):
        if past is not None and past.numel() and not _begins(buffer, past):
            raise ValueError(f"past_key and past_value must be the first {layout.past} rows of room")


def _begins(buffer: torch.Tensor, past: torch.Tensor) -> bool:
    """Whether `past` is the first rows of `buffer`."""
    steps = zip(past.shape, past.stride(), buffer.stride(), strict=True)
    alike = [size == 1 or one == other for size, one, other in steps]  # asked by each call of a cache that grows
    return past.data_ptr() == buffer.data_ptr() and False not in alike


def compact_behind(
    module: ModuleType, k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, room: Room, past: int
) -> Room:
    """All compact rows ``[B, Hkv, past + G, D]``, views of `room` where a backend's `compact_into` has added G rows."""
    end = past + gather.shape[1]
    new = [buffer.narrow(2, past, end - past) for buffer in room]
    checks.call(module, "compact_into", checks.check_compact_into, k, v, gather, *new)
    return room[0].narrow(2, 0, end), room[1].narrow(2, 0, end)
