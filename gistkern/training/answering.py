"""Questions answered from gist rows, with the whole context in sight, and without any: the numbers side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from gistkern.hf.chat import chat_context
from gistkern.hf.texts import context_ids, context_prefix
from gistkern.tables import nbytes_said
from gistkern.training.collator import GistDataCollator
from gistkern.training.generation import generate_answers, prompted_answers
from gistkern.training.objectives import adapters_off
from gistkern.training.rows import Tokenized
from gistkern.training.scores import scores_of, wilson

__all__ = ["WAYS", "Answered", "answered", "cells"]

WAYS = ("gist", "full", "none")
_NO_CONTEXT = "(no context)"


@dataclass(frozen=True)
class Answered:
    """What was said to each question, one way, in the order of the rows.

    Attributes
    ----------
    way : str
        ``"gist"``: from the gist rows alone. ``"full"``: with the context in sight and the adapter off, which is the
        base model. ``"none"``: the question alone, to the trained model.
    said, right : list of str
        Texts.
    tokens, rows : list of int
        Of each context: raw tokens, and key/value rows that the answer was read from.
    row_bytes : float
        Of a row, in all layers; 0 where nothing was compressed to tell it.
    seconds : float
        Of all answers together.
    """

    way: str
    said: list[str]
    right: list[str]
    tokens: list[int]
    rows: list[int]
    row_bytes: float
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Shares with their 95 % interval, and what was kept of a context, on average."""
        each = [scores_of(*one) for one in zip(self.said, self.right, strict=True)]
        n, exact = len(each), sum(one["exact"] for one in each)
        low, high = wilson(exact, n)
        rows = sum(self.rows) / n
        return {
            "n": n,
            "exact": exact / n,
            "exact_low": low,
            "exact_high": high,
            "contained": sum(one["contained"] for one in each) / n,
            "f1": sum(one["f1"] for one in each) / n,
            "tokens": sum(self.tokens) / n,
            "rows": rows,
            "ratio": sum(self.tokens) / sum(self.rows) if rows else None,
            "bytes": round(rows * self.row_bytes),
            "seconds": round(self.seconds, 2),
        }


def answered(
    model: Any,
    tokenizer: Any,
    data: Tokenized,
    collator: GistDataCollator,
    ways: Sequence[str] = WAYS,
    *,
    role: str | None = None,
    batch: int = 8,
    max_new_tokens: int | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Answered]:
    """Greedy answers to all rows, each way.

    Parameters
    ----------
    model : PreTrainedModel
        Patched; a peft wrapper around it will do. Answers end where its generation config says (`stop_ids`).
    tokenizer : PreTrainedTokenizerBase
        That of the training.
    data : Tokenized
        The rows.
    collator : GistDataCollator
        Cuts contexts as in training.
    ways : sequence of str
        Some of `WAYS`.
    role : str, optional
        As of `gistkern.hf.chat`.
    batch : int
        Rows that are read together; those of about equal length are.
    max_new_tokens : int, optional
        Of an answer; by default as many as the longest right one has.
    progress : callable
        Told how many more answers there are.
    """
    most = max_new_tokens or data.longest_answer
    order = sorted(range(len(data.features)), key=lambda at: len(data.features[at]["context_ids"]))
    was_training = model.training
    model.eval()
    try:
        found, row_bytes = [], 0.0
        for way in ways:
            one = _Asking(model, tokenizer, collator, way, role, most, row_bytes)
            for begin in range(0, len(order), batch):
                places = order[begin : begin + batch]
                one.ask(places, [data.features[place] for place in places])
                progress(len(places))
            found.append(one.answered())
            row_bytes = found[-1].row_bytes
        return found
    finally:
        model.train(was_training)


class _Asking:
    """One way, under way."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        collator: GistDataCollator,
        way: str,
        role: str | None,
        most: int,
        row_bytes: float,
    ) -> None:
        if way not in WAYS:
            raise ValueError(f"unknown way {way!r}: expected some of {list(WAYS)}")
        self.model, self.tokenizer, self.collator, self.way, self.most = model, tokenizer, collator, way, most
        self.row_bytes, self.started = row_bytes, time.perf_counter()
        self.found: dict[int, tuple[list[int], list[int], int, int]] = {}
        if role is None:
            self.nothing = list(context_prefix(tokenizer) or [])
        else:
            self.nothing = context_ids(tokenizer, chat_context(tokenizer, _NO_CONTEXT, role))

    def ask(self, places: list[int], features: list[dict[str, Any]]) -> None:
        """A batch."""
        tokens = [len(one["context_ids"]) for one in features]
        if self.way == "gist":
            said = generate_answers(self.model, self.collator, features, self.most)
            self.row_bytes = said.row_bytes
            predictions, rows = said.predictions, said.rows
        else:
            contexts = [one["context_ids"] if self.way == "full" else self.nothing for one in features]
            prompts = [
                torch.as_tensor([*context, *one["question_ids"]], dtype=torch.int64)
                for context, one in zip(contexts, features, strict=True)
            ]
            with adapters_off(self.model) if self.way == "full" else nullcontext():
                predictions = prompted_answers(self.model, prompts, self.most, self.collator.pad_id)
            rows = tokens if self.way == "full" else [0] * len(tokens)
        labels = [one["answer_ids"].tolist() for one in features]
        for place, *one in zip(places, predictions, labels, tokens, rows, strict=True):
            self.found[place] = (one[0], one[1], one[2], one[3])

    def answered(self) -> Answered:
        """All of them, in the order of the rows."""
        seconds = time.perf_counter() - self.started
        said, right, tokens, rows = zip(*(self.found[place] for place in sorted(self.found)), strict=True)
        return Answered(
            self.way, self._texts(said), self._texts(right), list(tokens), list(rows), self.row_bytes, seconds
        )

    def _texts(self, many: Sequence[list[int]]) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in many]


_TITLES = {"gist": "gist rows", "full": "full context", "none": "no context"}
_HEAD = ("", "n", "exact", "95 %", "contained", "F1", "rows", "ratio", "bytes", "seconds")


def cells(summaries: dict[str, dict[str, Any]], adapter: bool = True) -> tuple[list[str], list[list[str]]]:
    """Of `Answered.summary` by way: the head of a table, and its rows (`gistkern.tables`)."""
    rows = []
    for way, one in summaries.items():
        title = f"{_TITLES[way]}{', base' if way == 'full' and adapter else ''}"
        interval = f"{100 * one['exact_low']:.0f}-{one['exact_high']:.0%}"
        share = [f"{one['exact']:.1%}", interval, f"{one['contained']:.1%}", f"{one['f1']:.3f}"]
        kept = [f"{one['rows']:,.0f}", f"{one['ratio']:,.1f}x" if one["ratio"] else "-", nbytes_said(one["bytes"])]
        rows.append([title, f"{one['n']:,}", *share, *kept, f"{one['seconds']:,.1f}"])
    return list(_HEAD), rows
