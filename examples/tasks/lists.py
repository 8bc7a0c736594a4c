"""RULER's other tasks (Hsieh et al. 2024, arXiv 2404.06654): tracing variables, counting words, questions.

Tracing and counting of common words begin with a small worked example, as there. The texts are our own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, islice

from tasks.item import Draw, Item, fitting
from tasks.needles import hidden, noise, pairs

__all__ = ["common_words", "frequent_words", "question_among_others", "variables"]

HOPS = 4
COMMON = 10  # words that are asked for
ALPHA = 2.0  # how fast frequencies fall with the rank
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def variables(draw: Draw, index: int) -> Item:
    """A value and the chain of variables it is handed along, to be named all of them."""
    rng = draw.rng("vt", index)
    example, (value, names) = _chain(rng, hops=HOPS), _chain(rng, hops=HOPS)
    shown = " ".join(_assignments(*example))
    intro = (
        "Find all variables that hold a value, whether they were given it or another variable that holds it.\n\n"
        f"{shown}{_ask_variables(example[0])} {', '.join(example[1])}\n\n"
    )
    depths = sorted(rng.random() for _ in names)
    placed = list(zip(depths, _assignments(value, names), strict=True))
    return Item(
        id=f"{index}",
        context=hidden(intro, placed, noise("en"), draw),
        question=value,
        tail=_ask_variables(value),
        answers=tuple(names),
        scores=("recall_all",),
        new_tokens=draw.room(names),
    )


def _chain(rng: random.Random, hops: int) -> tuple[str, list[str]]:
    names: dict[str, None] = {}
    while len(names) < hops + 1:
        names["".join(rng.choice(LETTERS.upper()) for _ in range(5))] = None
    return str(rng.randrange(10_000, 100_000)), list(names)


def _assignments(value: str, names: list[str]) -> list[str]:
    return [f"VAR {name} = {held}." for name, held in zip(names, [value, *(f"VAR {n}" for n in names)], strict=False)]


def _ask_variables(value: str) -> str:
    asked = f"Which {HOPS + 1} variables hold the value {value}?"
    return f"\n\nQuestion: {asked}\nAnswer: The variables that hold {value} are"


def common_words(draw: Draw, index: int) -> Item:
    """A numbered list in which ten words stand often and all others seldom: 30 and 3 times, or 6 and once if short."""
    rng = draw.rng("cwe", index)
    often, seldom = (30, 3) if draw.length >= 4096 else (6, 1)
    words = pairs("en", rng)
    example = [next(words) for _ in range(14)]
    common = [next(words) for _ in range(COMMON)]
    others: list[str] = []
    order = rng.getrandbits(64)

    def make(k: int) -> str:
        others.extend(islice(words, max(0, k - len(others))))
        if len(others) < k:
            raise ValueError(f"{draw.length} tokens are too many: there are {len(others)} different words")
        return f"{intro}{_numbered(common * often + others[:k] * seldom, order)}"

    shown = _numbered(example[:COMMON] * 3 + example[COMMON:], rng.getrandbits(64))
    intro = (
        "Some words stand more often than others in a numbered list. Remember which.\n\n"
        f"{shown}{ASK_COMMON} {', '.join(example[:COMMON])}\n\n"
    )
    return Item(
        id=f"{index}",
        context=make(fitting(make, draw)),
        question=ASK_COMMON,
        tail=ASK_COMMON,
        answers=tuple(common),
        scores=("recall_all",),
        new_tokens=draw.room(common),
    )


ASK_COMMON = (
    f"\n\nQuestion: Which {COMMON} words stand most often in the list above?\nAnswer: The most common words are"
)


def _numbered(words: list[str], seed: int) -> str:
    shuffled = list(words)
    random.Random(seed).shuffle(shuffled)
    return " ".join(f"{place}. {word}" for place, word in enumerate(shuffled, start=1))


def frequent_words(draw: Draw, index: int) -> Item:
    """A text of invented words whose frequencies fall as rank^-2 (Zipf), the dots in front of them: the next three."""
    rng = draw.rng("fwe", index)
    invented = _invented(rng)
    words = ["...", *(next(invented) for _ in range(40))]
    order = rng.getrandbits(64)
    intro = (
        "Read the following text in code, and keep track of how often each word stands in it. Dots do not count.\n\n"
    )

    def make(k: int) -> str:
        # at least 16, 8, 4, 2: however short the text, the first four ranks differ
        counts = [max(round(2 * (k + 8) * rank**-ALPHA), 16 >> min(rank - 1, 4)) for rank in range(1, len(words) + 1)]
        text = list(chain.from_iterable([word] * times for word, times in zip(words, counts, strict=True)))
        random.Random(order).shuffle(text)
        return intro + " ".join(text)

    return Item(
        id=f"{index}",
        context=make(fitting(make, draw)),
        question=ASK_FREQUENT,
        tail=ASK_FREQUENT,
        answers=tuple(words[1:4]),
        scores=("recall_all",),
        new_tokens=draw.room(words[1:4]),
    )


ASK_FREQUENT = "\n\nQuestion: Which three words, other than dots, stand most often in the text?\nAnswer: The words are"


def _invented(rng: random.Random) -> Iterator[str]:
    seen = set()
    while True:
        word = "".join(rng.choice(LETTERS) for _ in range(6))
        if word not in seen:
            seen.add(word)
            yield word


def question_among_others(draw: Draw, index: int, tail: str) -> Item:
    """A question of SQuAD about one of many paragraphs, the others from other articles; `tail` takes {question}."""
    paragraph, question = draw.questions[index]
    rng = draw.rng("qa", index)
    others = [one.text for one in draw.paragraphs if one.article != paragraph.article]
    rng.shuffle(others)
    depth = rng.random()

    def make(k: int) -> str:
        texts = others[:k]
        texts.insert(round(depth * len(texts)), paragraph.text)
        return "\n\n".join(f"Document {place}: {text}" for place, text in enumerate(texts, start=1))

    return Item(
        id=question.id,
        context=make(fitting(make, draw, len(others))),
        question=question.text,
        tail=tail.format(question=question.text),
        answers=question.answers,
        scores=("recall_part", "f1", "exact"),
        new_tokens=draw.room([max(question.answers, key=len)]),
    )
