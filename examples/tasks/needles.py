"""RULER's needles (Hsieh et al. 2024, arXiv 2404.06654, section 3 and appendix B): retrieval from a haystack.

The texts are our own, and there are Korean ones. A haystack is noise (the same few sentences again and again), essays
(real prose, see passkey/prose.py) or other needles of the same kind.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path

import yaml

from passkey.prose import passage, prose
from tasks.item import Draw, Item, fitting

__all__ = ["NEEDLES", "WORDS", "Needles", "hidden", "needles", "noise", "pairs"]

WORDS = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text("utf-8"))


@dataclass(frozen=True)
class Needles:
    """A needle task: the haystack, what keys and values are, and how many of each stand there and are asked for."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


# by RULER's names; single_words is ours, so that each kind of value is asked for alone
NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essays"),
    "niah_single_3": Needles("essays", value="uuids"),
    "niah_single_words": Needles("essays", value="words"),
    "niah_multikey_1": Needles("essays", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essays", values=4),
    "niah_multiquery": Needles("essays", keys=4, asked=4),
}


def needles(name: str, language: str, draw: Draw, index: int) -> Item:
    """The item of a task of `NEEDLES`."""
    task, words, rng = NEEDLES[name], WORDS[language], draw.rng(f"{name}-{language}", index)
    keys, values = (_fresh(kind, language, rng) for kind in (task.key, task.value))
    kind, kinds = words["kinds"][task.value]
    held = {key: list(islice(values, task.values)) for key in islice(keys, task.keys)}
    asked = rng.sample(list(held), task.asked)

    def sentence(key: str, value: str) -> str:
        return words["needle"].format(kind=kind, key=key, value=value)

    placed = sorted((rng.random(), sentence(key, value)) for key, own in held.items() for value in own)
    if task.haystack == "needles":
        lines: Iterator[str] = (sentence(key, value) for key, value in zip(keys, values, strict=False))
    else:
        lines = noise(language) if task.haystack == "noise" else passage(prose(language, True), rng)
    answers = tuple(value for key in asked for value in held[key])
    comma, last = words["and"]
    named = last.join(filter(None, [comma.join(asked[:-1]), asked[-1]]))
    tail = words["one" if len(answers) == 1 else "many"][0].format(kind=kind, kinds=kinds, key=named)
    return Item(
        id=f"{index}",
        context=hidden(words["intro"].format(kinds=kinds), placed, lines, draw),
        question=named,
        tail=tail,
        answers=answers,
        scores=("recall_all",),
        new_tokens=draw.room(answers),
        language=language,
    )


def hidden(intro: str, placed: list[tuple[float, str]], lines: Iterator[str], draw: Draw) -> str:
    """A text of `draw.length` tokens: sentences at their depths (0 front, 1 end), in order, among other lines."""
    known: list[str] = []

    def make(k: int) -> str:
        known.extend(islice(lines, max(0, k - len(known))))
        if len(known) < k:
            raise ValueError(f"{draw.length} tokens are too many: there are {len(known)} different needles")
        text = known[:k]
        for depth, sentence in reversed(placed):
            text.insert(round(depth * k), sentence)
        return intro + " ".join(text)

    return make(fitting(make, draw))


def noise(language: str) -> Iterator[str]:
    """The same few sentences without end."""
    return cycle(WORDS[language]["noise"])


def pairs(language: str, rng: random.Random) -> Iterator[str]:
    """All pairs of words, none twice, in random order."""
    first, second = (WORDS[language][part].split() for part in ("first", "second"))
    every = [f"{a}-{b}" for a in first for b in second]
    rng.shuffle(every)
    yield from every


def _fresh(kind: str, language: str, rng: random.Random) -> Iterator[str]:
    """Keys or values, none twice."""
    own = random.Random(rng.getrandbits(64))  # how many of one kind are drawn changes none of another
    if kind == "words":
        return pairs(language, own)
    if kind == "numbers":
        return _once(str(own.randrange(10**6, 10**7)) for _ in count())
    return _once(str(uuid.UUID(int=own.getrandbits(128), version=4)) for _ in count())


def _once(drawn: Iterator[str]) -> Iterator[str]:
    seen = set()
    for one in drawn:
        if one not in seen:
            seen.add(one)
            yield one
