"""Compressed documents as plain tensors: one after the other, each a contiguous run of rows.

``rows`` is ``[R, layers, 2, Hkv, D]``: row by row, so that a document is one slice of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gistkern.cache import GistCache, GistLayer
from gistkern.cache_plan import CacheState

__all__ = ["CompressedDocument", "from_cache", "to_cache"]


@dataclass(frozen=True)
class CompressedDocument:
    """One document: ``rows [r, layers, 2, Hkv, D]``, the tokens it had and the position of what comes next."""

    rows: torch.Tensor
    seen: int
    tail_position: int


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


def to_cache(
    documents: Sequence[CompressedDocument], positions: str, fingerprint: str, device: torch.device | str = "cpu"
) -> GistCache:
    """A ragged batch, right-aligned as a cache stores it; the first model that reads it is checked."""
    own = [len(document.rows) for document in documents]
    shape = documents[0].rows.shape[1:]
    rows = documents[0].rows.new_zeros((len(documents), max(own), *shape))
    for sample, document in enumerate(documents):
        rows[sample, max(own) - own[sample] :] = document.rows
    rows = rows.to(device)
    numbers: dict[str, list[int]] = {
        "seen": [document.seen for document in documents],
        "gist_rows": own,
        "tail_rows": [0] * len(documents),
        "tail_position": [document.tail_position for document in documents],
    }
    cache = GistCache()
    cache.positions, cache.fingerprint, cache.unchecked = positions, fingerprint, True
    own_numbers: dict[str, Any] = {name: torch.tensor(values, device=device) for name, values in numbers.items()}
    cache.state = CacheState(
        **own_numbers,
        tail_is_gist=torch.zeros(len(documents), 0, dtype=torch.bool, device=device),
        gist_columns=max(own),
        tail_columns=0,
        length=max(numbers["seen"]),
    )
    for index in range(shape[0]):
        keys, values = (rows[:, :, index, kind].transpose(1, 2).contiguous() for kind in range(2))
        cache.layers.append(GistLayer.holding(keys, values))
    return cache
