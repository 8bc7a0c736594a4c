"""The metrics of docs/metrics.md that are computed from answers: what an answer is worth, and the rows of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from passkey.niah import KEY_DIGITS, Sample

__all__ = ["OUTCOMES", "Answer", "digit_accuracy", "judged", "numbers_in", "outcome", "parsed", "rows_of", "wilson"]

OUTCOMES = ("exact", "hallucinated_context", "hallucinated_invented", "abstained")
# answers that agree in these are one row of the report
GROUP = ("language", "tokens", "filler", "wordings", "keys")
DEPTH_BINS = 10


@dataclass(frozen=True)
class Answer:
    """What was said to one sample, what that is worth, and how many cached rows it was read from.

    `model` and `digest` say who answered what: they let an interrupted evaluation go on (answers.py). `digits` is the
    digit accuracy, `row_bytes` what a row's keys and values take in all layers.
    """

    model: str
    digest: str
    id: str
    language: str
    tokens: int
    filler: str
    wordings: str
    keys: int
    depth: float
    answer: str
    said: str
    outcome: str
    digits: float
    rows: int
    row_bytes: int

    @property
    def exact(self) -> bool:
        """Whether the answer is the right one."""
        return self.outcome == "exact"


def judged(sample: Sample, said: str, rows: int, row_bytes: int, model: str) -> Answer:
    """What `model` said to a sample, read from so many cached rows of so many bytes."""
    same = ("digest", "id", "language", "tokens", "filler", "wordings", "depth", "answer")
    return Answer(
        **{name: getattr(sample, name) for name in same},
        model=model,
        keys=len(sample.keys),
        said=said,
        outcome=outcome(said, sample.answer, sample.context),
        digits=digit_accuracy(said, sample.answer),
        rows=rows,
        row_bytes=row_bytes,
    )


def parsed(said: str) -> str | None:
    """The well-formed answer in what a model said: the first run of digits, if it has as many as a key."""
    run = re.search("[0-9]+", said)
    return run[0] if run and len(run[0]) == KEY_DIGITS else None


def numbers_in(text: str) -> set[str]:
    """The whole numbers that stand in a text; a separator of thousands does not end one."""
    return {run.replace(",", "") for run in re.findall(r"[0-9]+(?:,[0-9]{3}(?![0-9]))*", text)}


def outcome(said: str, answer: str, context: str) -> str:
    """Which of `OUTCOMES` an answer is; every answer is exactly one of them."""
    found = parsed(said)
    if found is None:
        return "abstained"
    if found == answer:
        return "exact"
    return "hallucinated_context" if found in numbers_in(context) else "hallucinated_invented"


def digit_accuracy(said: str, answer: str) -> float:
    """Fraction of a key's places that hold the right digit, in the well-formed key or else in the text as it is."""
    text = parsed(said) or said.strip()
    return sum(a == b for a, b in zip(text, answer, strict=False)) / len(answer)


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
        groups.setdefault(tuple(getattr(answer, name) for name in GROUP), []).append(answer)
    return [_row(dict(zip(GROUP, key, strict=True)), group) for key, group in groups.items()]


def _row(key: dict[str, Any], group: Sequence[Answer]) -> dict[str, Any]:
    n = len(group)
    count = {name: sum(answer.outcome == name for answer in group) for name in OUTCOMES}
    rows = sum(answer.rows for answer in group) / n
    size = sum(answer.rows * answer.row_bytes for answer in group) / n
    full = sum(answer.tokens * answer.row_bytes for answer in group) / n
    low, high = wilson(count["exact"], n)
    return {
        **key,
        "gist_tokens": round(rows),
        "ratio": key["tokens"] / rows,
        "n": n,
        "exact": count["exact"] / n,
        "wilson_low": low,
        "wilson_high": high,
        "hallucinated": (count["hallucinated_context"] + count["hallucinated_invented"]) / n,
        **{name: count[name] / n for name in OUTCOMES[1:]},
        "digit": sum(answer.digits for answer in group) / n,
        "full_kv_bytes": round(full),
        "gist_kv_bytes": round(size),
        "bytes_ratio": full / size,
        "by_depth": _by_depth(group),
    }


def _by_depth(group: Sequence[Answer]) -> list[dict[str, Any]]:
    """Exact match per tenth of the context in which the needle starts."""
    found = []
    for index in range(DEPTH_BINS):
        inside = [answer.exact for answer in group if min(int(answer.depth * DEPTH_BINS), DEPTH_BINS - 1) == index]
        exact = sum(inside) / len(inside) if inside else None
        found.append({"depth": (index + 0.5) / DEPTH_BINS, "n": len(inside), "exact": exact})
    return found
