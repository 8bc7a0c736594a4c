"""The metrics of metrics.md that are computed from answers: what an answer is worth, and the rows of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from passkey.niah import KEY_DIGITS, Sample

__all__ = ["OUTCOMES", "Answer", "numbers_in", "parsed", "rows_of", "wilson"]

OUTCOMES = ("exact", "hallucinated_context", "hallucinated_invented", "abstained")
DEPTH_BINS = 10


@dataclass(frozen=True)
class Answer:
    """What was said to a sample, read from so many cached rows of so many bytes each, all layers together."""

    sample: Sample
    said: str
    rows: int
    row_bytes: int

    @property
    def exact(self) -> bool:
        """Whether the answer is the right one."""
        return parsed(self.said) == self.sample.answer

    @cached_property
    def outcome(self) -> str:
        """Which of `OUTCOMES` it is; every answer is exactly one of them."""
        found = parsed(self.said)
        if found is None:
            return "abstained"
        if found == self.sample.answer:
            return "exact"
        return "hallucinated_context" if found in numbers_in(self.sample.context) else "hallucinated_invented"

    @property
    def digits(self) -> float:
        """Fraction of a key's places that hold the right digit, in the well-formed key or else in what was said."""
        text = parsed(self.said) or self.said.strip()
        return sum(a == b for a, b in zip(text, self.sample.answer, strict=False)) / len(self.sample.answer)

    @property
    def kind(self) -> dict[str, Any]:
        """Of which kind the question is: answers that agree in this are one row of the report."""
        same = ("language", "tokens", "filler", "wordings")
        return {**{name: getattr(self.sample, name) for name in same}, "keys": len(self.sample.keys)}


def parsed(said: str) -> str | None:
    """The well-formed answer in what a model said: the first run of digits, if it has as many as a key."""
    run = re.search("[0-9]+", said)
    return run[0] if run and len(run[0]) == KEY_DIGITS else None


def numbers_in(text: str) -> set[str]:
    """The whole numbers that stand in a text; a separator of thousands does not end one."""
    return {run.replace(",", "") for run in re.findall(r"[0-9]+(?:,[0-9]{3}(?![0-9]))*", text)}


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, "Probable inference, the law of succession")."""
    if not n:
        return 0.0, 1.0
    share, square = hits / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def rows_of(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """One row of the report for each group of answers, in the order in which the groups appear."""
    groups: dict[tuple[Any, ...], list[Answer]] = {}
    for answer in answers:
        groups.setdefault(tuple(answer.kind.values()), []).append(answer)
    return [_row(group) for group in groups.values()]


def _row(group: Sequence[Answer]) -> dict[str, Any]:
    n, row_bytes = len(group), group[0].row_bytes
    tokens, rows = group[0].sample.tokens, sum(answer.rows for answer in group) / n
    count = {name: sum(answer.outcome == name for answer in group) for name in OUTCOMES}
    low, high = wilson(count["exact"], n)
    return {
        **group[0].kind,
        "gist_tokens": round(rows),
        "ratio": tokens / rows,
        "n": n,
        "exact": count["exact"] / n,
        "wilson_low": low,
        "wilson_high": high,
        "hallucinated": (count["hallucinated_context"] + count["hallucinated_invented"]) / n,
        **{name: count[name] / n for name in OUTCOMES[1:]},
        "digit": sum(answer.digits for answer in group) / n,
        "full_kv_bytes": tokens * row_bytes,
        "gist_kv_bytes": round(rows * row_bytes),
        "bytes_ratio": tokens / rows,
        "by_depth": _by_depth(group),
    }


def _by_depth(group: Sequence[Answer]) -> list[dict[str, Any]]:
    """Exact match per tenth of the context in which the needle starts."""
    found = []
    for index in range(DEPTH_BINS):
        inside = [
            answer.exact for answer in group if min(int(answer.sample.depth * DEPTH_BINS), DEPTH_BINS - 1) == index
        ]
        exact = sum(inside) / len(inside) if inside else None
        found.append({"depth": (index + 0.5) / DEPTH_BINS, "n": len(inside), "exact": exact})
    return found
