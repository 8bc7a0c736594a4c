"""Which segments of a context a question is about: by the attention of its queries, or by the words it shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gistkern.cache.raw import RawSegments
from gistkern.rows import dequantize

__all__ = ["AttentionScores", "bm25", "check_scorer", "ranked"]

_SCORERS = ("attention", "bm25", "union")
# k1 and b of Robertson and Zaragoza (2009), "The Probabilistic Relevance Framework"
_SATURATION, _BY_LENGTH = 1.2, 0.75
_SHARES = 2**24  # shares of attention that are held at once, 64 MiB


def check_scorer(scorer: str) -> None:
    """Raise ValueError for a name that is none."""
    if scorer not in _SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(_SCORERS)}, got {scorer!r}")


class AttentionScores:
    """Adds up, layer by layer, how much of a question's attention falls on each compact row.

    In each head of each layer a token's softmax is over the sample's compact rows (sinks included, so that a head which
    looks for nothing says little). The mean over heads, layers and tokens of what the gists of a segment get is the
    segment's score. Where a cache has dropped those gists (hierarchical models) their keys, which were kept with the
    raw rows, are scored beside the rows that stayed.

    Parameters
    ----------
    cache : GistCache
        Read by the question, with rows of its samples' own.
    raw : RawSegments
        Of those samples.
    real : Tensor
        bool ``[B, N]``: the question's tokens that are no padding.
    """

    def __init__(self, cache: Any, raw: RawSegments, real: torch.Tensor) -> None:
        self._layers, self._raw, self._owned = cache.layers, raw, cache.state.owned_gists()
        self._weight = real.float() / real.sum(1, keepdim=True)
        self._numbers = [raw.of_sample(sample) for sample in raw.samples()]
        self._total: torch.Tensor | None = None

    def add(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any) -> None:
        """Of queries ``[B, Hq, N, D]`` of one layer, in the question's call."""
        rows = self._layers[layer].gist
        key, owned = dequantize(rows.key, rows.key_scale, torch.float32), self._owned.to(q.device)
        if (index := self._index(layer)) is not None:
            key = torch.cat([key, index[0].to(q.device, torch.float32)], 2)
            owned = torch.cat([owned, index[1].to(q.device)], 1)
        scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
        found = key.new_zeros(owned.shape)
        # a few of the question's tokens at a time: shares of all would take heads x tokens x rows floats
        step = max(1, _SHARES // (q.shape[0] * q.shape[1] * key.shape[2]))
        for part, weight in zip(q.split(step, 2), self._weight.to(q.device).split(step, 1), strict=True):
            grouped = part.float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # of all heads that share keys
            scores = (grouped @ key.transpose(2, 3)) * scale
            share = scores.masked_fill(~owned[:, None, None], -torch.inf).softmax(-1)
            share = share.unflatten(2, (-1, part.shape[2])).mean((1, 2))  # [B, tokens, rows]
            found += (share * weight[..., None]).sum(1)
        found = found.cpu()
        self._total = found if self._total is None else self._total + found

    def _index(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys ``[B, Hkv, rows, D]`` of the segments' own gists and which a sample owns, right-aligned, or None."""
        samples = []
        for numbers in self._numbers:
            keys = [self._raw.index(layer, number) for number in numbers]
            if keys[0] is None:
                return None
            samples.append(torch.cat(keys).transpose(0, 1))  # type: ignore[arg-type]
        most = max(keys.shape[1] for keys in samples)
        pad = torch.nn.functional.pad
        owned = [torch.arange(most) >= most - keys.shape[1] for keys in samples]
        return torch.stack([pad(keys, (0, 0, most - keys.shape[1], 0)) for keys in samples]), torch.stack(owned)

    def of_segments(self) -> list[np.ndarray]:
        """Each sample's scores, in the order of its segments."""
        assert self._total is not None
        gists, found = self._raw.origin.gists, []
        for numbers, total, mine in zip(self._numbers, self._total, self._owned.sum(1).tolist(), strict=True):
            begin = self._owned.shape[1] - mine
            begins = [begin + self._raw.segments[number].gist_row for number in numbers]
            if total.shape[0] > self._owned.shape[1]:  # their own keys, behind the rows that stayed
                begins = [total.shape[0] - gists * behind for behind in range(len(numbers), 0, -1)]
            shares = [total[first : first + gists].sum() for first in begins]
            found.append(torch.stack(shares).numpy() / len(self._layers))
        return found


def bm25(question: Sequence[int], documents: Sequence[np.ndarray]) -> np.ndarray:
    """Scores of documents by the ids they share with a question, as BM25 weighs them.

    Examples
    --------
    >>> bm25([5, 6], [np.array([1, 2, 5]), np.array([5, 6, 6]), np.array([3, 4, 4])]).round(2).tolist()
    [0.47, 1.82, 0.0]
    """
    counts = [Counter(one.tolist()) for one in documents]
    mean = sum(map(len, documents)) / len(documents)
    found = np.zeros(len(documents))
    for word in question:
        holding = sum(word in count for count in counts)
        rare = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for number, count in enumerate(counts):
            length = 1 - _BY_LENGTH + _BY_LENGTH * len(documents[number]) / mean
            found[number] += rare * count[word] * (_SATURATION + 1) / (count[word] + _SATURATION * length)
    return found


def ranked(scores: np.ndarray, top_k: int) -> set[int]:
    """The `top_k` best, of equal ones the first."""
    return set(np.argsort(-scores, kind="stable")[:top_k].tolist())
