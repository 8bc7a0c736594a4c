"""A cache's file: what of a `GistCache` is written (gistkern/cache/file.py says how), and what one is made of again."""

from __future__ import annotations

import os
from typing import Any

import torch

from gistkern.cache import file
from gistkern.cache.layer import GistLayer
from gistkern.cache.plan import CacheState
from gistkern.cache.raw import RawSegments
from gistkern.cache.signed import Signed
from gistkern.cache.tail import TailRows
from gistkern.cache.tokens_read import ContextRead, TokensRead
from gistkern.rows import KeyValueRows

__all__ = ["load", "save"]


def save(
    path: str | os.PathLike,
    origin: Signed,
    state: CacheState,
    read: TokensRead,
    layers: list[Any],
    raw: RawSegments | None,
) -> None:
    """See `GistCache.save`."""
    if raw is not None and raw.path is not None and os.path.realpath(path) == os.path.realpath(raw.path):
        raise ValueError(f"{path} holds the raw rows of this cache, which saving would overwrite: pass another name")
    if origin.fingerprint is None and origin.is_signed:
        raise ValueError(
            "the model that wrote the cache is gone, or its weights were changed since, and a file names its "
            "model: save before, or compress again"
        )
    ids = read.ids()
    found = file.CacheFile(
        positions=origin.positions,
        fingerprint=origin.fingerprint,
        contexts=sorted(map(str, origin.contexts)),
        dtype=layers[0].dtype,
        state=vars(state),
        read=torch.empty(len(state.seen), 0, dtype=torch.int64) if ids is None else ids,
        layers=[(layer.gist, KeyValueRows(*layer.tail.pair)) for layer in layers],
        cuts=origin.cuts if raw is None else raw.cuts(),
    )
    file.save(found, path)


def load(
    path: str | os.PathLike, origin: Signed, device: torch.device | str
) -> tuple[CacheState, TokensRead, list[GistLayer]]:
    """State, tokens and layers on a device; where they come from is written to `origin`. See `GistCache.load`."""
    found = file.load(path)
    origin.positions, origin.fingerprint = found.positions, found.fingerprint
    origin.contexts, origin.cuts = set(map(ContextRead.parse, found.contexts)), tuple(found.cuts)
    layers = []
    for gist, tail in found.layers:
        rows = TailRows(tail.key.to(device), tail.value.to(device))
        layers.append(GistLayer.holding(gist.map(lambda t: t.to(device)), rows, found.dtype))
    return CacheState(**found.state).on(device), TokensRead(found.read.to(device, torch.int64)), layers
