"""`GistCache.restore`: the raw rows of a few segments, behind the gist rows of a cache made for one question."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gistkern.cache.evaluating import evaluating
from gistkern.cache.fingerprint import check_cache
from gistkern.cache.layer import GistLayer
from gistkern.cache.pool import base_of
from gistkern.cache.questions import read_questions
from gistkern.cache.ranking import AttentionScores, bm25, check_scorer, ranked
from gistkern.cache.raw import RawSegments, copyable
from gistkern.cache.reader import patched
from gistkern.cache.tail import TailRows
from gistkern.cache.versions import CACHE
from gistkern.layout.arguments import check_count
from gistkern.rows import KeyValueRows, dequantize_rows, gather_rows

__all__ = ["restored"]


@torch.no_grad()
def restored(
    cache: Any, model: Any, question_ids: Any, top_k: int, attention_mask: torch.Tensor | None, scorer: str
) -> Any:
    """See `GistCache.restore`."""
    state = cache.without_tail("restore before the question is read")
    check_count("top_k", top_k)
    check_scorer(scorer)
    if cache.raw is None:
        raise ValueError(
            "the cache holds no raw rows: compress with keep_raw, or load it with raw=..., and restore from that cache "
            "(not from one that restore has made)"
        )
    handle: Any = patched(model)
    check_cache(cache, model)
    cache.raw.check(cache, state)
    ids, real = read_questions(handle, question_ids, attention_mask)
    if len(ids) != cache.batch_size != 1:
        raise ValueError(
            f"restore got {len(ids)} questions for a cache of {cache.batch_size} samples: pass one question per "
            "sample, or a cache of one sample for several questions"
        )
    asked = cache.clone() if cache.first is None or not top_k else _unshared(cache)
    if (repeats := len(ids) // cache.batch_size) > 1:
        asked.batch_repeat_interleave(repeats)
    raw: RawSegments = asked.raw
    asked.raw = None
    if not top_k:
        return asked
    chosen = _chosen(handle, asked, raw, ids, real, top_k, scorer)
    wanted = {number: raw.rows(number) for number in sorted(set().union(*chosen))}  # of questions that share some, once
    return _with_rows(asked, [[wanted[number] for number in numbers] for numbers in chosen])


def _unshared(cache: Any) -> Any:
    """A clone in which each sample has gist rows of its own."""
    state, copy = cache.state, cache.clone()
    place = (torch.arange(state.gist_columns, device=state.seen.device) + base_of(state, cache.first)).clamp(min=0)
    copy.first = None
    copy.layers = [
        GistLayer.holding(
            layer.gist.map(lambda t: t[place.to(t.device)].transpose(1, 2)), layer.tail.map(torch.clone), layer.dtype
        )
        for layer in cache.layers
    ]
    return copy


def _chosen(
    handle: Any, asked: Any, raw: RawSegments, ids: torch.Tensor, real: torch.Tensor, top_k: int, scorer: str
) -> list[list[int]]:
    """Numbers of the segments that each sample gets back, in the order of its tokens."""
    numbers = [raw.of_sample(sample) for sample in raw.samples()]
    found: list[set[int]] = [set() for _ in numbers]
    if scorer in ("attention", "union"):
        reading = asked.clone()
        scores = AttentionScores(reading, raw, real)
        reading.watch = scores.add
        with evaluating(handle.inner):  # a model in training would draw its dropout, and may fill no cache at all
            handle.inner(input_ids=ids, attention_mask=real.long(), use_cache=True, **{CACHE: reading})
        for best, one in zip(found, scores.of_segments(), strict=True):
            best |= ranked(one, top_k)
    if scorer in ("bm25", "union"):
        for best, own, question, mask in zip(found, numbers, ids.cpu(), real.cpu(), strict=True):
            words = [raw.segments[number].ids for number in own]
            best |= ranked(bm25(question[mask].tolist(), words), top_k)
    return [[own[place] for place in sorted(best)] for own, best in zip(numbers, found, strict=True)]


def _with_rows(asked: Any, rows: list[list[KeyValueRows]]) -> Any:
    """The cache with each sample's raw rows behind its gist rows."""
    state = asked.state
    counts = [sum(one.key.shape[1] for one in own) for own in rows]
    most = max(counts)
    count = torch.tensor(counts, device=state.seen.device)
    total = state.gist_rows + count
    columns = int(total.max())
    # [gist rows, right-aligned | raw rows, left-aligned]: each sample's stand side by side, and move to the right
    shift = (state.gist_columns + count - columns)[:, None]
    index = (torch.arange(columns, device=count.device) + shift).clamp(min=0)
    for number, layer in enumerate(asked.layers):
        gist, dtype, place = layer.gist, layer.gist.key.dtype, layer.gist.key.device
        raw = KeyValueRows(*(t.to(place).transpose(1, 2) for t in _of_layer(rows, number, most).tensors()))
        if raw.key.dtype != dtype:
            dtype = layer.dtype if gist.quantized else dtype
            raw, gist = dequantize_rows(raw, dtype), dequantize_rows(gist, dtype)
        pairs = zip(gist.tensors(), raw.tensors(), strict=True)
        joined = KeyValueRows(*(_joined(mine, behind, index.to(mine.device)) for mine, behind in pairs))
        asked.layers[number] = GistLayer.holding(joined, TailRows(*layer.tail.pair), layer.dtype)
    asked.state = replace(state, gist_rows=total, gist_columns=columns)
    return asked


def _of_layer(rows: list[list[KeyValueRows]], layer: int, most: int) -> KeyValueRows:
    """Of each sample the rows of one layer side by side, ``[B, most, Hkv, D]``, with zeros behind them."""
    found = []
    for part, like in enumerate(rows[0][0].tensors()):
        block = copyable(torch.zeros(len(rows), most, *like.shape[2:]).to(like.dtype))
        for room, own in zip(block, rows, strict=True):
            begin = 0
            for one in own:
                new = copyable(one.tensors()[part])[layer]
                room[begin : begin + len(new)] = new
                begin += len(new)
        found.append(block.view(like.dtype))
    return KeyValueRows(*found)


def _joined(gist: torch.Tensor, raw: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    both = torch.cat([copyable(gist), copyable(raw)], 2)
    return gather_rows(both, index).view(gist.dtype)
