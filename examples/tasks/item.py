"""One thing to answer: a context that is compressed, and a tail that is read behind it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tasks.squad import Paragraph, Question, articles, shuffled

__all__ = ["Draw", "Item", "fitting"]


@dataclass(frozen=True)
class Item:
    """A context, and what is asked about it.

    `tail` ends where the answer begins, which ends at a line's end or after `new_tokens`; `question` is what in it
    a search looks for. `scores` are names of `scoring`, the one that counts first.
    """

    id: str
    context: str
    question: str
    tail: str
    answers: tuple[str, ...]
    scores: tuple[str, ...]
    new_tokens: int
    language: str = "en"

    @property
    def digest(self) -> str:
        """Identity: no two items of the same text differ, and one of another text is another item."""
        text = json.dumps([self.context, self.tail, self.answers, self.scores, self.new_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """What items are drawn with: tokens of a text, the wanted length of contexts, the seed, and SQuAD's paragraphs."""

    count: Callable[[str], int]
    length: int
    seed: int
    paragraphs: Sequence[Paragraph] = ()

    @cached_property
    def questions(self) -> list[tuple[Paragraph, Question]]:
        """SQuAD's questions about paragraphs, in this seed's order."""
        return shuffled(self.paragraphs, self.seed)

    @cached_property
    def article_questions(self) -> list[tuple[Paragraph, Question]]:
        """Those about whole articles, in this seed's order."""
        return shuffled(articles(self.paragraphs), self.seed)

    def rng(self, task: str, index: int) -> random.Random:
        """Its own random numbers for each item, so that more of them change none."""
        return random.Random(f"{self.seed}-{task}-{self.length}-{index}")

    def room(self, answers: Sequence[str]) -> int:
        """New tokens for an answer that names all of these, with half as many to spare."""
        return 8 + round(1.5 * self.count(", ".join(answers)))


def fitting(make: Callable[[int], str], draw: Draw, most: int | None = None) -> int:
    """The number of units, at most `most`, that fill `draw.length` tokens; ValueError if not even 0 fit.

    `make(k)` is the text of k units, and more units are more tokens.
    """

    def fits(k: int) -> bool:
        return (most is None or k <= most) and draw.count(make(k)) <= draw.length

    if not fits(0):
        raise ValueError(
            f"{draw.length} tokens are too few: what must stand in the context takes {draw.count(make(0))}"
        )
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
