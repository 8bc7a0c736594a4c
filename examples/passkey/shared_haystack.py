"""The segments of long contexts that share their haystack: a context of its own has only those that hold its needle.

`GistLayout.shared_segments` puts them in one row, so that a batch of B long contexts of S segments costs about S + B
segments instead of B * S.
"""

from __future__ import annotations

from gistkern import segments_of
from passkey.niah import Haystack

__all__ = ["needle_segments", "plain_segments"]


def plain_segments(haystack: Haystack, count: int, length: int, overlap: int) -> list[list[int]]:
    """`count` consecutive segments of a haystack without a needle; the last is of any length that a cut leaves."""
    step = length - overlap
    ids, _ = _plain(haystack, (count - 1) * step + haystack.rng.randint(overlap + 1, length))
    return segments_of(ids, length, overlap)


def needle_segments(haystack: Haystack, length: int, overlap: int) -> tuple[list[list[int]], str]:
    """The segments of some context that hold any token of its needle, and the key."""
    rng = haystack.rng
    key = haystack.key()
    needle = haystack.encode(" " + rng.choice(haystack.language.needles).format(key=key))
    filler, starts = _plain(haystack, rng.randint(length // 4, 3 * length))
    at = rng.choice(starts)
    ids = filler[:at] + needle + filler[at:]
    places = segments_of(range(len(ids)), length, overlap)
    return [ids[p.start : p.stop] for p in places if p.start < at + len(needle) and at < p.stop], key


def _plain(haystack: Haystack, tokens: int) -> tuple[list[int], list[int]]:
    """Ids of `tokens` tokens of haystack, and the places between its sentences."""
    ids: list[int] = []
    starts: list[int] = []
    lines = haystack.lines()
    while len(ids) < tokens:
        starts.append(len(ids))
        ids += next(lines)
    return ids[:tokens], [*starts, tokens]
