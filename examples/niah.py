"""Needle-in-a-haystack samples: passkeys hidden in varied text, English and Korean, as JSON lines.

    python examples/niah.py --lang ko --tokens 6096 --samples 200 --out niah-ko.jsonl

The same seed writes the same bytes. Lengths are counted by the tokenizer: by default a small byte-level BPE
trained here on the spot (single-digit tokens), or any ``--tokenizer`` folder that transformers can load.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from haystack import LANGUAGES, Language, is_held_out, number, scrambled, sentence

__all__ = ["KEY_DIGITS", "Haystack", "Sample", "dataset", "train_tokenizer"]

KEY_DIGITS = 5
POOL = 10_000


@dataclass(frozen=True)
class Sample:
    """One question about one context. `depth` is where its needle starts, 0 (front) to 1 (end)."""

    id: str
    language: str
    context: str
    question: str
    answer: str
    depth: float
    tokens: int
    keys: dict[str, str]


@lru_cache(maxsize=1)
def train_tokenizer(vocab_size: int = 1024, seed: int = 0) -> Tokenizer:
    """Byte-level BPE over both languages in which every digit is a token of its own."""
    rng = random.Random(seed)
    lines = []
    for language in LANGUAGES.values():
        lines += [" " + sentence(language, False, rng).replace("{n}", number(rng)) for _ in range(POOL // 2)]
        for needle in (*language.needles, language.question) * 50:
            lines.append(" " + needle.strip().format(key=rng.randrange(10**KEY_DIGITS)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


class Haystack:
    """Draws contexts of an exact number of tokens in one language.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        Counts the tokens.
    language : str
        ``"en"`` or ``"ko"``.
    held_out : bool
        Evaluation's side of the split: sentences and keys that training never shows.
    rng : random.Random
        The only source of chance.
    """

    def __init__(self, tokenizer: Tokenizer, language: str, held_out: bool, rng: random.Random) -> None:
        if language not in LANGUAGES:
            raise ValueError(f"unknown language {language!r}: expected one of {', '.join(LANGUAGES)}")
        self.tokenizer, self.held_out, self.rng = tokenizer, held_out, rng
        self.language: Language = LANGUAGES[language]
        # digits are tokens of their own, so the text between numbers can be encoded once for all
        lines = [sentence(self.language, held_out, rng) for _ in range(POOL)]
        if not held_out:
            lines[::2] = [scrambled(self.language, rng) for _ in lines[::2]]
        self._pool = [f" {line}".split("{n}") for line in lines]
        self._digit = {digit: self.encode(digit)[0] for digit in "0123456789"}
        self._ids = {piece: self.encode(piece) for piece in {piece for line in self._pool for piece in line}}

    def line(self) -> tuple[str, list[int]]:
        """Text and ids of one haystack sentence with fresh numbers."""
        first, *rest = self.rng.choice(self._pool)
        text, ids = first, list(self._ids[first])
        for piece in rest:
            value = number(self.rng)
            text += value + piece
            ids += [*(self._digit[digit] for digit in value), *self._ids[piece]]
        return text, ids

    def key(self) -> str:
        """A key of `KEY_DIGITS` digits of this side of the split."""
        while True:
            key = "".join(self.rng.choice("0123456789") for _ in range(KEY_DIGITS))
            if is_held_out(key) == self.held_out:
                return key

    def _cut(self, ids: list[int], count: int) -> tuple[str, list[int]]:
        """A sentence cut to `count` tokens: where that would split a character, digits take the last places."""
        keep = count
        while self.encode(text := self.tokenizer.decode(ids[:keep])) != ids[:keep]:
            keep -= 1
        rest = "7" * (count - keep)
        return text + rest, ids[:keep] + [self._digit[digit] for digit in rest]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def draw(self, tokens: int, depth: float | None = None, keys: int = 1) -> tuple[list[int], Sample]:
        """Ids of a context of exactly `tokens` tokens, and the question about one of its keys."""
        rng = self.rng
        asked_depth = rng.random() if depth is None else depth
        names = [""] if keys == 1 else rng.sample(self.language.words["name"], keys)
        secrets: dict[str, str] = {}
        for name in names:
            secrets[name] = self.key()
        asked = rng.choice(names)
        wordings = self.language.needles if keys == 1 else self.language.named_needles
        needles = [
            (asked_depth if name == asked else rng.random(), " " + rng.choice(wordings).format(key=key, name=name))
            for name, key in secrets.items()
        ]
        needles.sort()
        encoded = [(at, text, self.encode(text)) for at, text in needles]
        filler = tokens - sum(len(ids) for _, _, ids in encoded)
        if filler < 0:
            raise ValueError(f"{tokens} tokens are too few for {keys} needle(s): they take {tokens - filler}")
        ids: list[int] = []
        pieces: list[str] = []
        used = 0
        start = 0.0
        for at, text, needle in [*encoded, (1.0, "", [])]:
            # whole sentences up to the needle's place; the last stretch is cut to the exact length
            goal = round(at * filler)
            while used < goal:
                line, line_ids = self.line()
                if used + len(line_ids) > filler:
                    line, line_ids = self._cut(line_ids, filler - used)
                used += len(line_ids)
                ids += line_ids
                pieces.append(line)
            if needle and f"{secrets[asked]}" in text:
                start = len(ids) / tokens
            ids += needle
            pieces.append(text)
        wording = self.language.question if keys == 1 else self.language.named_question
        sample = Sample(
            id="",
            language=self.language.code,
            context="".join(pieces),
            question=wording.format(name=asked),
            answer=secrets[asked],
            depth=round(start, 4),
            tokens=len(ids),
            keys=secrets,
        )
        return ids, sample


def dataset(
    tokenizer: Tokenizer, language: str, tokens: int, samples: int, *, seed: int = 0, keys: int = 1
) -> Iterator[Sample]:
    """Held-out samples with depths spread evenly from front to end."""
    haystack = Haystack(tokenizer, language, True, random.Random(f"{seed}-{language}-{tokens}-{keys}"))
    for index in range(samples):
        depth = (index + 0.5) / samples
        _, sample = haystack.draw(tokens, depth, keys)
        yield Sample(**{**asdict(sample), "id": f"{language}-{tokens}-{seed}-{index}"})


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lang", default="en", choices=sorted(LANGUAGES))
    parser.add_argument("--tokens", type=int, default=2990, help="exact length of every context")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--keys", type=int, default=1, help="passkeys per context; one is asked for, by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="a transformers tokenizer's folder; the tiny preset's own by default")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer).backend_tokenizer
    else:
        tokenizer = train_tokenizer()
    try:
        samples = list(dataset(tokenizer, given.lang, given.tokens, given.samples, seed=given.seed, keys=given.keys))
    except ValueError as error:
        parser.error(str(error))
    given.out.write_text("".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples))
    print(f"{len(samples)} samples of {given.tokens:,} tokens in {given.out}")


if __name__ == "__main__":
    main()
