"""The calls of a compression from the host to the device: one copy for each type, before the first call runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from gistkern.cache.host_plan import Call
from gistkern.cache.plan import CacheState, CallPlan
from gistkern.layout import GistLayout
from gistkern.layout.checks import trusted
from gistkern.layout.fields import LayoutFields
from gistkern.layout.plain import marked

__all__ = ["on_device"]


def on_device(calls: list[Call], device: torch.device) -> Iterator[Call]:
    """The calls with tensors on a device in place of arrays, copied there before the first is given out."""
    given = [_arrays(call) for call in calls]
    names = [list(map(id, arrays)) for arrays in given]
    sent = {name: one for of_call in zip(names, given, strict=True) for name, one in zip(*of_call, strict=True)}
    moved = dict(zip(sent, _tensors(list(sent.values()), device, packed=device.type != "cpu"), strict=True))
    found = [_moved(call, [moved[name] for name in of_call]) for call, of_call in zip(calls, names, strict=True)]
    # the last state is the cache's, apart from the buffers of the calls; nobody reads the others' vectors
    last = found[-1].plan
    state: dict[str, Any] = {
        name: torch.from_numpy(one.copy()).to(device) if isinstance(one, np.ndarray) else one
        for name, one in vars(last.after).items()
    }
    return iter([*found[:-1], replace(found[-1], plan=replace(last, after=CacheState(**state)))])


_VECTORS = tuple(field.name for field in fields(LayoutFields) if field.name not in ("past", "tail"))


def _arrays(call: Call) -> list[Any]:
    """Those of a call, but for its state's: the layout's vectors last."""
    plan, layout = call.plan, call.plan.layout
    more: list[Any] = [plan.keep_gists] if isinstance(plan.keep_gists, np.ndarray) else []
    return [call.words, call.rows, plan.position_ids, plan.real, *more, *map(layout.__dict__.__getitem__, _VECTORS)]


def _moved(call: Call, tensors: list[Any]) -> Call:
    """The call with `tensors` in place of `_arrays`."""
    plan, host = call.plan, call.plan.layout
    words, rows, place, real, *rest = tensors
    # what the rule has made has the shapes that it should: nobody asks each call's once more
    layout = object.__new__(GistLayout)
    layout.__dict__.update(zip(_VECTORS, rest[-len(_VECTORS) :], strict=True), past=host.past, tail=host.tail)
    # a segment that is alone in the first call sees all of it
    alone = not host.past and not host.local_begin.any() and bool((host.gist_begin == host.gist_end).all())
    layout = trusted(marked(layout, alone) if alone else layout)
    keep_gists = rest[0] if len(rest) > len(_VECTORS) else plan.keep_gists
    known: Any = {"keep_tail": plan.keep_tail, "real": real, "context": True, "capacity": plan.capacity}
    return Call(words, rows, CallPlan(layout, place, plan.after, keep_gists=keep_gists, **known))


_ALIGNED = 16  # elements: kernels are specialised for pointers to whole 16 bytes


def _tensors(arrays: list[np.ndarray], device: torch.device, packed: bool = True) -> list[torch.Tensor]:
    """The arrays as tensors on a device: views of one buffer for each type if `packed`, else for each type and shape.

    The second asks less of the host, and is for a device that is the host.
    """
    if not packed:
        return _of_alike(arrays)
    arrays = [one if one.flags.c_contiguous else np.ascontiguousarray(one) for one in arrays]
    room: dict[np.dtype, int] = {}
    places = []
    for one in arrays:
        places.append(room.get(one.dtype, 0))
        room[one.dtype] = places[-1] + -(-one.size // _ALIGNED) * _ALIGNED
    host = {dtype: np.zeros(count, dtype) for dtype, count in room.items()}
    for one, place in zip(arrays, places, strict=True):
        host[one.dtype][place : place + one.size] = one.ravel()
    there = {dtype: torch.from_numpy(flat).to(device, non_blocking=True) for dtype, flat in host.items()}
    return [
        there[one.dtype].as_strided(one.shape, (*one.shape[1:], 1), place)
        for one, place in zip(arrays, places, strict=True)
    ]


def _of_alike(arrays: list[np.ndarray]) -> list[torch.Tensor]:
    """Tensors on the host; those of one type and shape are copied at once."""
    alike: dict[Any, list[int]] = {}
    for index, one in enumerate(arrays):
        key = one.dtype, one.shape
        if key in alike:
            alike[key] += [index]
        else:
            alike[key] = [index]
    found: dict[int, torch.Tensor] = {}
    for places in alike.values():
        copies = torch.from_numpy(np.array([arrays[place] for place in places])).unbind()
        found.update(zip(places, copies, strict=True))
    return [found[index] for index in range(len(arrays))]
