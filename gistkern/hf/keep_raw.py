"""The calls of `compress` when it keeps raw rows too: each layer's are copied off the device as they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from gistkern.cache.cache import GistCache
from gistkern.cache.host_plan import Call
from gistkern.cache.raw import Recording
from gistkern.cache.raw_file import RawOrigin, writing
from gistkern.cache.tokens_read import ContextRead
from gistkern.hf.handle import GistHandle
from gistkern.rows import LARGEST

__all__ = ["check_raw", "keeping_raw"]


def check_raw(keep_raw: Any, raw_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError unless raw rows can be kept there in that type, before anything is read."""
    if raw_dtype is not None and raw_dtype not in LARGEST and raw_dtype != dtype:
        raise ValueError(f"raw_dtype must be torch.int8, torch.float8_e4m3fn or the model's {dtype}, got {raw_dtype}")
    if keep_raw is None:
        if raw_dtype is not None:
            raise ValueError("raw_dtype is of raw rows that are kept: pass keep_raw too")
    elif not isinstance(keep_raw, str | os.PathLike):
        raise TypeError(f'keep_raw must be "cpu" or the path of a file, got {keep_raw!r}')
    elif keep_raw in ("disk", "") or _names_device(keep_raw):
        raise ValueError(f'keep_raw must be "cpu" or the path of a file to write, got {keep_raw!r}')


def _names_device(name: str | os.PathLike) -> bool:
    """Whether a text is a device's name ("cuda:0", "mps"), which nobody means as a file's."""
    try:
        return isinstance(name, str) and name != "cpu" and torch.device(name) is not None
    except RuntimeError:
        return False


@contextmanager
def keeping_raw(
    handle: GistHandle,
    cache: GistCache,
    calls: list[Call],
    contexts: Sequence[ContextRead],
    keep_raw: str | os.PathLike,
    raw_dtype: torch.dtype | None,
) -> Iterator[Callable[[], None]]:
    """Inside, the raw rows of the calls are kept, by the function that is given after each; in the end they are `raw`.

    A file takes its name when all calls are through.
    """
    after, gists = calls[-1].plan.after, handle.segment_gist_token_ids
    origin = RawOrigin(
        handle.positions,
        cache.fingerprint,
        tuple(map(str, contexts)),
        tuple(after.seen.tolist()),
        tuple(after.gist_rows.tolist()),
        handle.model.dtype,
        len(gists or handle.gist_token_ids),
    )
    recording = Recording(calls, origin, len(handle.windows), raw_dtype, bool(gists))
    with nullcontext() if keep_raw == "cpu" else writing(keep_raw, origin, recording.segments) as file:
        cache.watch = recording.take
        try:
            yield lambda: recording.end_call(file)
        finally:
            cache.watch = None
        cache.raw = recording.finish(file)
