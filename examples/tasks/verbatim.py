"""Repeat a sentence of real prose word for word: the one that contains some words, or the one that follows another."""

from __future__ import annotations

import random
from itertools import islice

from passkey.prose import passage, prose
from tasks.item import Draw, Item, fitting

__all__ = ["verbatim"]

QUOTED = 5  # words
WORDS = range(8, 31)  # of a sentence that is asked for


def verbatim(draw: Draw, index: int, follows: bool) -> Item:
    """The sentence behind the one with some words (`follows`), or that one itself; the words stand nowhere else."""
    rng = draw.rng(f"verbatim-{follows}", index)
    lines: list[str] = []
    text = passage(prose("en", True), rng)

    def make(k: int) -> str:
        lines.extend(islice(text, max(0, k - len(lines))))
        return " ".join(lines[:k])

    held = lines[: fitting(make, draw)]
    context = " ".join(held)
    places = [place for place, line in enumerate(held) if len(line.split()) in WORDS and held.count(line) == 1]
    rng.shuffle(places)
    for place in places:
        quoted_from = place - follows
        quote = _quote(held[quoted_from], context, rng) if quoted_from >= 0 else ""
        if quote:
            which = f"follows the one with the words “{quote}”" if follows else f"contains the words “{quote}”"
            return Item(
                id=f"{index}",
                context=context,
                question=quote,
                tail=f"\n\nTask: Repeat the sentence that {which}, word for word.\nSentence:",
                answers=(held[place],),
                scores=("repeated", "edit_similarity"),
                new_tokens=draw.room([held[place]]),
            )
    raise ValueError(f"{draw.length} tokens are too few: no sentence can be asked for")


def _quote(line: str, context: str, rng: random.Random) -> str:
    """Consecutive words of a line that stand once in the context; empty if there are none."""
    words = line.split()
    for start in rng.sample(range(max(0, len(words) - QUOTED + 1)), max(0, len(words) - QUOTED + 1)):
        quote = " ".join(words[start : start + QUOTED])
        if context.count(quote) == 1:
            return quote
    return ""
