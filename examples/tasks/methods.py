"""The ways to read that need no other environment: all, nothing, the beginning, what BM25 finds, and gist rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from tasks.bm25 import ranked, sentences
from tasks.engine import Answer, Engine, first_line, timed
from tasks.item import Item

__all__ = ["PLAIN", "Gists", "budget", "full", "none", "retrieved", "truncated"]


def budget(tokens: int, ratio: float) -> int:
    """Rows that may stay of so many tokens."""
    return max(1, int(tokens / ratio))


def full(engine: Engine, items: Sequence[Item], ratio: float) -> list[Answer]:
    """With the whole context in the cache."""
    return _kept(engine, items, engine.context(items[0].context))


def none(engine: Engine, items: Sequence[Item], ratio: float) -> list[Answer]:
    """From the question alone."""
    return _kept(engine, items, engine.start)


def truncated(engine: Engine, items: Sequence[Item], ratio: float) -> list[Answer]:
    """From the context's first tokens."""
    ids = engine.context(items[0].context)
    return _kept(engine, items, ids[: budget(len(ids), ratio)])


def retrieved(engine: Engine, items: Sequence[Item], ratio: float) -> list[Answer]:
    """From the sentences that BM25 finds by the question, which this method alone sees before it chooses."""
    rows = budget(len(engine.context(items[0].context)), ratio)
    answers = []
    for item in items:
        ids, seconds = timed(partial(best_sentences, engine, item, rows))
        answers += _kept(engine, [item], ids, seconds)
    return answers


def best_sentences(engine: Engine, item: Item, rows: int) -> list[int]:
    """Ids of the best sentences in the context's order; the last one that was taken is cut to fill the rows."""
    parts, left = sentences(item.context), rows - len(engine.start)
    chosen: dict[int, list[int]] = {}
    for place in ranked(item.question, parts):
        chosen[place] = engine.ids(f" {parts[place]}" if chosen else parts[place])[: max(0, left)]
        left -= len(chosen[place])
    return [*engine.start, *(one for place in sorted(chosen) for one in chosen[place])]


def _kept(engine: Engine, items: Sequence[Item], ids: list[int], spent: float = 0.0) -> list[Answer]:
    """Answers from these tokens of the context."""
    cache, seconds = timed(lambda: engine.read(ids))
    tokens, nbytes = len(engine.context(items[0].context)), len(ids) * engine.row_bytes
    return [Answer(engine.answer(cache, len(ids), item), tokens, len(ids), nbytes, spent + seconds) for item in items]


PLAIN = {"full": full, "none": none, "truncated": truncated, "bm25": retrieved}


class Gists:
    """Gist rows of a checkpoint or adapter: as many segments of equal length as the budget has rows for.

    The segments are those of the ratio, whatever the training had, so rows may be fewer than the budget: they come in
    gist tokens of a segment, and one segment there always is.
    """

    def __init__(self, folder: str, base: str | None, **from_pretrained: Any) -> None:
        import gistkern  # only here: kvpress' environment has none

        self.gistkern = gistkern
        self.model, self.tokenizer, self.handle = gistkern.load(folder, base, **from_pretrained)
        if self.handle.segment_gist_token_ids:
            raise ValueError(f"{folder} writes as many rows whatever the length: a ratio cannot be chosen")

    def segment_length(self, tokens: int, ratio: float) -> int:
        """Tokens of a segment."""
        rows = budget(tokens, ratio) - self.handle.sink_tokens
        return math.ceil(tokens / max(1, rows // len(self.handle.gist_token_ids)))

    def read(self, items: Sequence[Item], ratio: float) -> list[Answer]:
        """One answer for each item, which share one context."""
        ids = self.tokenizer(items[0].context)["input_ids"]
        length = self.segment_length(len(ids), ratio)
        length = None if length >= len(ids) else length  # one segment, as a training without segments has it
        cache, seconds = timed(partial(self.gistkern.compress, self.model, [ids], segment_length=length))
        return [
            Answer(self._answer(cache, item), len(ids), int(cache.gist_rows), cache.nbytes, seconds) for item in items
        ]

    def _answer(self, cache: Any, item: Item) -> str:
        how = {"chat": False, "max_new_tokens": item.new_tokens}
        return first_line(self.gistkern.ask(self.model, self.tokenizer, cache, item.tail, **how))
