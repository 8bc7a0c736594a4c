"""Speed of the gist cache beside the full cache, in alternating rounds of one process.

A side is a model, a prefill and what the prefill leaves: the same greedy loop then reads both caches. The full
cache is transformers' DynamicCache on the unpatched model; both are cropped back after each question.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

from gistkern import GistCache, compress
from passkey.niah import KEY_DIGITS

__all__ = ["BATCHES", "Side", "decode_by_batch", "full_side", "gist_side", "paying_questions", "rounds"]

ROUNDS = 3
NEW_TOKENS = 64
QUESTIONS = 8
BATCHES = (4, 16, 64)
BATCH_TOKENS = 8
LARGEST_CACHE = 2 << 30


@dataclass(frozen=True)
class Side:
    """A way to read a context: `prefill` returns a fresh cache of it for `model`."""

    model: LlamaForCausalLM
    prefill: Callable[[], Any]


def gist_side(model: LlamaForCausalLM, context: torch.Tensor, compression: Mapping[str, int]) -> Side:
    """Compression into gist rows, by a patched model."""
    return Side(model.eval(), lambda: compress(model, context, **compression))


def full_side(model: LlamaForCausalLM, context: torch.Tensor) -> Side:
    """The keys and values of every token, by an unpatched model."""

    def prefill() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(context, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    return Side(model.eval(), prefill)


@torch.no_grad()
def rounds(sides: Mapping[str, Side], question: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Medians per side: seconds to the first token and of each part, tokens per second, totals over reuse."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            found[name].append(_round(side, question))
    return {name: _medians(measured) for name, measured in found.items()}


def _round(side: Side, question: torch.Tensor) -> dict[str, Any]:
    begin = time.perf_counter()
    cache = side.prefill()
    read = time.perf_counter()
    token = _next(side.model, cache, question)
    first = time.perf_counter()
    for _ in range(NEW_TOKENS):
        token = _next(side.model, cache, token)
    decoded = time.perf_counter()
    cache.crop(-(question.shape[1] + NEW_TOKENS))
    totals, start = [], time.perf_counter()
    for _ in range(QUESTIONS):
        token = _next(side.model, cache, question)
        for _ in range(KEY_DIGITS - 1):
            token = _next(side.model, cache, token)
        cache.crop(-(question.shape[1] + KEY_DIGITS - 1))
        totals.append(read - begin + time.perf_counter() - start)
    return {
        "prefill_s": read - begin,
        "time_to_first_token_s": first - begin,
        "decode_tokens_per_s": NEW_TOKENS / (decoded - first),
        "total_s": totals,
    }


def _next(model: LlamaForCausalLM, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """The greedy token ``[B, 1]`` after `ids`."""
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)


def _medians(measured: list[dict[str, Any]]) -> dict[str, Any]:
    found = {name: statistics.median(m[name] for m in measured) for name in measured[0] if name != "total_s"}
    totals = [statistics.median(at) for at in zip(*(m["total_s"] for m in measured), strict=True)]
    return {**found, "total_s": totals, "question_s": (totals[-1] - totals[0]) / (QUESTIONS - 1)}


def paying_questions(gist: Mapping[str, Any], full: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """First and last number of questions on one context at which compressing costs no more time than the full cache.

    From the median total of one question and the mean time of one more. The first is None if it never pays, the
    last if it never stops.
    """
    behind = gist["total_s"][0] - full["total_s"][0]
    gained = full["question_s"] - gist["question_s"]
    if behind <= 0:
        return 1, None if gained >= 0 else 1 + math.floor(behind / gained)
    return (1 + math.ceil(behind / gained), None) if gained > 0 else (None, None)


def _cache_bytes(cache: GistCache | DynamicCache) -> int:
    if isinstance(cache, GistCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def decode_by_batch(sides: Mapping[str, Side], question: torch.Tensor, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Decode tokens per second, all sequences of the batch together, each over its own copy of the cache.

    Batches whose full caches would take more than `LARGEST_CACHE` bytes are not measured on any side, and their
    row says so.
    """
    rows: list[dict[str, Any]] = []
    read = {name: side.prefill() for name, side in sides.items()}
    largest = max(_cache_bytes(cache) for cache in read.values())
    for batch in batches:
        if batch * largest > LARGEST_CACHE:
            rows.append({"batch": batch, "not_measured": f"the full caches would take {batch * largest:,} bytes"})
            continue
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        caches = copy.deepcopy(read)
        for name, cache in caches.items():
            cache.batch_repeat_interleave(batch)
            _next(sides[name].model, cache, question.expand(batch, -1))
        token = question[:, -1:].expand(batch, -1)
        for _ in range(ROUNDS):
            for name, side in sides.items():
                begin = time.perf_counter()
                for _ in range(BATCH_TOKENS):
                    _next(side.model, caches[name], token)
                speeds[name].append(batch * BATCH_TOKENS / (time.perf_counter() - begin))
                caches[name].crop(-BATCH_TOKENS)
        rows.append({"batch": batch, **{name: statistics.median(speed) for name, speed in speeds.items()}})
    return rows
