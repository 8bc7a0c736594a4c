"""Sentences for passkey haystacks in English and Korean, made of what languages.yaml holds.

A haystack is made of varied sentences full of numbers, so that "the only number in the text" is no way to
find the key. Sentences and keys are split by a checksum: what evaluation sees, training never did.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

__all__ = ["LANGUAGES", "Language", "decoy", "is_held_out", "number", "scrambled", "sentence"]


@dataclass(frozen=True)
class Language:
    """Material of one language.

    `templates` take the `words` by name and numbers as ``{n}``; `held_out` ones are for evaluation alone.
    `needles` and `named_needles` state a key twice, as the original passkey task does (Mohtashami and Jaggi
    2023, "Landmark Attention", section 4.2); the named ones also take ``{name}``. `held_out_needles` are built
    otherwise and are for evaluation alone; most state the key once. `statement` is the shortest way to say it,
    `secret` what it is called. Each question, and the `cue`, which only starts the answer, ends where the answer's
    digits follow. `alphabet` is the code point of the first letter and their number.
    """

    code: str
    templates: list[str]
    held_out: list[str]
    needles: list[str]
    held_out_needles: list[str]
    named_needles: list[str]
    statement: str
    secret: str
    question: str
    cue: str
    named_question: str
    words: dict[str, list[str]] = field(repr=False)
    alphabet: tuple[int, int]


_READ = yaml.safe_load(Path(__file__).with_name("languages.yaml").read_text("utf-8"))
LANGUAGES = {code: Language(code, **entries) for code, entries in _READ.items()}


def is_held_out(text: str) -> bool:
    """Whether a sentence (without its numbers) or a key is for evaluation alone: one in five is."""
    return zlib.crc32(text.encode()) % 5 == 0


def sentence(language: Language, held_out: bool, rng: random.Random) -> str:
    """One haystack sentence of the wanted side of the split, with ``{n}`` where its numbers go."""
    templates = language.templates + (language.held_out if held_out else [])
    while True:
        template = rng.choice(templates)
        filled = template
        for slot, words in language.words.items():
            while f"{{{slot}}}" in filled:
                filled = filled.replace(f"{{{slot}}}", rng.choice(words), 1)
        if template in language.held_out or is_held_out(filled) == held_out:
            return filled


def scrambled(language: Language, rng: random.Random) -> str:
    """Words of two training sentences and invented ones in random order, most often with numbers among them.

    Half of the training haystack: without it a small model learns the few words and places that haystack
    numbers stand beside instead of what announces a key, and every new sentence looks like a needle. Lines without
    any number are among them because a model that met few of those took a held-out sentence without one for a needle.
    """
    numbered = rng.random() < 0.6
    words = " ".join(sentence(language, False, rng) for _ in range(2)).split(" ")
    rng.shuffle(words)
    chosen = [
        word if "{n}" in word or rng.random() < 0.5 else _invented(language, rng)
        for word in words[: rng.randint(4, 12)]
        if numbered or "{n}" not in word
    ]
    if numbered:
        chosen.insert(rng.randint(0, len(chosen)), "{n}")
    return " ".join(chosen) or _invented(language, rng)


def decoy(language: Language, rng: random.Random) -> str:
    """A needle's wording about something else than the pass key, with a number that looks like a key.

    An eighth of the training haystack: without it what a small model learns to look for is the wording around a
    key, and held-out sentences that resemble it ("... is 4821.") are taken for needles, more often the longer the
    context.
    """
    wording = rng.choice((*language.needles, language.statement)).strip()
    words = rng.choice(language.words[rng.choice(sorted(language.words))]), _invented(language, rng)
    thing = rng.choice((*words, " ".join(words)))
    return wording.replace(language.secret, thing).format(key="".join(rng.choice("0123456789") for _ in range(5)))


def _invented(language: Language, rng: random.Random) -> str:
    """A word of random letters or syllables, so that training meets every token of the vocabulary."""
    first, count = language.alphabet
    word = "".join(chr(first + rng.randrange(count)) for _ in range(rng.randint(1, 6)))
    return word.capitalize() if rng.random() < 0.2 else word


def number(rng: random.Random) -> str:
    """A number of a haystack sentence: one to six digits, so that many look like keys."""
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 6)))
