"""Compressed documents as plain tensors: one after the other, each a contiguous run of rows.

``rows`` is ``[R, layers, 2, Hkv, D]``: row by row, so that a document is one slice of a file.

What a reader of files does here is numpy's work: a forked child in which torch has more than one thread hangs in the
first large copy (OpenMP's threads stay with the parent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gistkern.cache.cache import GistCache
from gistkern.cache.host_plan import Placed
from gistkern.cache.layer import GistLayer
from gistkern.cache.plan import CacheState
from gistkern.cache.tail import TailRows
from gistkern.cache.tokens_read import ContextRead
from gistkern.rows import KeyValueRows

__all__ = ["CompressedDocument", "bytes_of", "documents_of", "to_cache"]


@dataclass(frozen=True)
class CompressedDocument:
    """One document: ``rows [r, layers, 2, Hkv, D]``, the tokens it had and the position of what comes next.

    `context` is the digest of its tokens, by which a prompt that repeats them is known.
    """

    rows: torch.Tensor
    seen: int
    tail_position: int
    context: ContextRead | None = None


def documents_of(cache: GistCache, placed: Sequence[Placed]) -> list[CompressedDocument]:
    """The documents that `gistkern.hf.compress.compress_documents` read as one sample."""
    layers = [torch.stack(cache.compact(index)) for index in range(len(cache.layers))]  # [2, 1, Hkv, G, D]
    rows = torch.stack(layers)[:, :, 0].permute(3, 0, 1, 2, 4).cpu()  # [G, layers, 2, Hkv, D]
    return [
        CompressedDocument(rows[torch.from_numpy(one.columns)].contiguous(), one.seen, one.tail_position)
        for one in placed
    ]


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a CPU tensor, uint8."""
    found: np.ndarray = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return found


def to_cache(
    documents: Sequence[CompressedDocument],
    positions: str,
    fingerprint: str,
    device: torch.device | str = "cpu",
    asked: Sequence[int] | None = None,
) -> GistCache:
    """A ragged batch of documents; the first model that reads it is checked.

    Parameters
    ----------
    documents : sequence of CompressedDocument
        One per sample, or with `asked` each once.
    positions, fingerprint : str
        Of the model that compressed them.
    device : torch.device or str
        Where to.
    asked : sequence of int, optional
        Each sample's document. The documents' rows then stand once, one document behind the other, and are shared
        (`GistCache.shared`); otherwise they are right-aligned, as a cache stores rows of its own.

    Raises
    ------
    ValueError
        If the documents' rows are not of one model.
    """
    first = documents[0].rows
    kinds = {(document.rows.shape[1:], document.rows.dtype) for document in documents}
    if len(kinds) > 1:
        said = " and ".join(f"{dtype} of [rows, {', '.join(map(str, shape))}]" for shape, dtype in kinds)
        raise ValueError(f"the documents were not written by one model: {said}")
    samples = documents if asked is None else [documents[place] for place in asked]
    own = [len(document.rows) for document in samples]
    numbers: dict[str, list[int]] = {
        "seen": [document.seen for document in samples],
        "gist_rows": own,
        "tail_rows": [0] * len(samples),
        "tail_position": [document.tail_position for document in samples],
    }
    cache = GistCache()
    cache.positions, cache.fingerprint = positions, fingerprint
    cache.contexts = {document.context for document in documents if document.context is not None}
    own_numbers: dict[str, Any] = {name: torch.tensor(values, device=device) for name, values in numbers.items()}
    cache.state = CacheState(
        **own_numbers,
        tail_is_gist=torch.zeros(len(samples), 0, dtype=torch.bool, device=device),
        gist_columns=max(own),
        tail_columns=0,
        length=max(numbers["seen"]),
    )
    # [R, layers, 2, Hkv, bytes of D]
    pieces = [bytes_of(one.rows).reshape(*one.rows.shape[:4], -1) for one in documents]
    if asked is not None:
        begins = np.cumsum([0, *map(len, pieces)])
        cache.first = torch.tensor(begins[list(asked)], device=device)
    for index in range(first.shape[1]):
        both = (_joined if asked is not None else _aligned)([piece[:, index] for piece in pieces])
        gist = KeyValueRows(*(torch.from_numpy(rows).view(first.dtype).to(device) for rows in both))
        tails = (gist.key.new_empty(len(samples), first.shape[3], 0, first.shape[4]) for _ in range(2))
        cache.layers.append(GistLayer.holding(gist, TailRows(*tails), first.dtype))
    return cache


def _joined(pieces: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Keys and values ``[R, Hkv, bytes of D]`` of pieces ``[r, 2, Hkv, bytes of D]``, one behind the other."""
    return tuple(np.concatenate([piece[:, kind] for piece in pieces]) for kind in range(2))


def _aligned(pieces: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Keys and values ``[B, Hkv, G, bytes of D]`` of pieces ``[r, 2, Hkv, bytes of D]``, each in the last columns."""
    columns, (_, _, heads, width) = max(map(len, pieces)), pieces[0].shape
    both = tuple(np.zeros((len(pieces), heads, columns, width), dtype=np.uint8) for _ in range(2))
    for sample, piece in enumerate(pieces):
        for kind, rows in enumerate(both):
            rows[sample, :, columns - len(piece) :] = piece[:, kind].swapaxes(0, 1)
    return both
