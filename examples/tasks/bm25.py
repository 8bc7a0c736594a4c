"""BM25 (Robertson and Zaragoza 2009) over the sentences of one context."""

from __future__ import annotations

import math
import re
from collections import Counter

__all__ = ["ranked", "scores", "sentences", "terms"]

K1, B = 1.2, 0.75  # Lucene's


def sentences(text: str) -> list[str]:
    """A text's sentences: it is cut behind a full stop, question or exclamation mark, and at line ends."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def terms(text: str) -> list[str]:
    """Words in lower case; of Korean, whose words take endings, pairs of syllables."""
    found = []
    for word in re.findall(r"[가-힣]+|[^\W_가-힣]+", text.lower()):
        korean = "가" <= word[0] <= "힣" and len(word) > 2
        found += [word[at : at + 2] for at in range(len(word) - 1)] if korean else [word]
    return found


def scores(query: str, documents: list[str]) -> list[float]:
    """Each document's score for a query, whose terms count as often as they stand there."""
    held = [Counter(terms(one)) for one in documents]
    mean = sum(one.total() for one in held) / max(1, len(held)) or 1
    found = [0.0] * len(held)
    for term in terms(query):
        having = sum(term in one for one in held)
        rarity = math.log(1 + (len(held) - having + 0.5) / (having + 0.5))
        for place, one in enumerate(held):
            often = one[term]
            found[place] += rarity * often * (K1 + 1) / (often + K1 * (1 - B + B * one.total() / mean))
    return found


def ranked(query: str, documents: list[str]) -> list[int]:
    """The places of documents from the best to the worst; of equal scores the earlier one is first."""
    found = scores(query, documents)
    return sorted(range(len(documents)), key=lambda place: (-found[place], place))
