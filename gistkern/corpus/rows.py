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

from gistkern.cache.cache import GistCache, GistLayer
from gistkern.cache.plan import CacheState
from gistkern.cache.tokens_read import ContextRead

__all__ = ["CompressedDocument", "bytes_of", "from_cache", "to_cache"]


@dataclass(frozen=True)
class CompressedDocument:
    """One document: ``rows [r, layers, 2, Hkv, D]``, the tokens it had and the position of what comes next.

    `context` is the digest of its tokens, by which a prompt that repeats them is known.
    """

    rows: torch.Tensor
    seen: int
    tail_position: int
    context: ContextRead | None = None


def from_cache(cache: GistCache) -> list[CompressedDocument]:
    """The samples of a cache that `gistkern.compress` made."""
    state = cache.without_tail("only compressed documents are stored")
    layers = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]  # [2, B, Hkv, G, D]
    rows = torch.stack(layers).permute(2, 4, 0, 1, 3, 5).cpu()  # [B, G, layers, 2, Hkv, D]
    return [
        CompressedDocument(rows[sample, state.gist_columns - own :].contiguous(), seen, position)
        for sample, (own, seen, position) in enumerate(
            zip(state.gist_rows.tolist(), state.seen.tolist(), state.tail_position.tolist(), strict=True)
        )
    ]


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a CPU tensor, uint8."""
    found: np.ndarray = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return found


def to_cache(
    documents: Sequence[CompressedDocument], positions: str, fingerprint: str, device: torch.device | str = "cpu"
) -> GistCache:
    """A ragged batch, right-aligned as a cache stores it; the first model that reads it is checked.

    Raises
    ------
    ValueError
        If the documents' rows are not of one model.
    """
    own = [len(document.rows) for document in documents]
    first = documents[0].rows
    kinds = {(document.rows.shape[1:], document.rows.dtype) for document in documents}
    if len(kinds) > 1:
        said = " and ".join(f"{dtype} of [rows, {', '.join(map(str, shape))}]" for shape, dtype in kinds)
        raise ValueError(f"the documents were not written by one model: {said}")
    numbers: dict[str, list[int]] = {
        "seen": [document.seen for document in documents],
        "gist_rows": own,
        "tail_rows": [0] * len(documents),
        "tail_position": [document.tail_position for document in documents],
    }
    cache = GistCache()
    cache.positions, cache.fingerprint = positions, fingerprint
    cache.contexts = {document.context for document in documents if document.context is not None}
    own_numbers: dict[str, Any] = {name: torch.tensor(values, device=device) for name, values in numbers.items()}
    cache.state = CacheState(
        **own_numbers,
        tail_is_gist=torch.zeros(len(documents), 0, dtype=torch.bool, device=device),
        gist_columns=max(own),
        tail_columns=0,
        length=max(numbers["seen"]),
    )
    # [R, layers, 2, Hkv, bytes of D]
    pieces = [bytes_of(one.rows).reshape(*one.rows.shape[:4], -1) for one in documents]
    for index in range(first.shape[1]):
        layer = []
        for kind in range(2):
            rows = np.zeros((len(pieces), first.shape[3], max(own), pieces[0].shape[4]), dtype=np.uint8)
            for sample, piece in enumerate(pieces):
                rows[sample, :, max(own) - own[sample] :] = piece[:, index, kind].swapaxes(0, 1)
            layer.append(torch.from_numpy(rows).view(first.dtype).to(device))
        cache.layers.append(GistLayer.holding(*layer))
    return cache
