"""Needle-in-a-haystack samples: passkeys hidden in varied text, English and Korean, counted by a tokenizer."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from passkey.haystack import LANGUAGES, Language, decoy, is_held_out, number, scrambled, sentence
from passkey.prose import passage, prose

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
    filler: str
    wordings: str

    @property
    def digest(self) -> str:
        """Tells this sample from every other."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over both languages in which every digit is a token of its own."""
    rng, lines = random.Random(0), []
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
        vocab_size=1024,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


class Haystack:
    """Draws contexts of an exact number of tokens in one language.

    The `tokenizer` counts them (of a transformers one it is the `backend_tokenizer`), `rng` is the only source of
    chance, and `held_out` is evaluation's side of the split: sentences and keys that training never shows. The filler
    is made of "templates" (haystack.py) or "prose" (consecutive sentences of real documents, prose.py); `wordings` are
    the sentences that state a key. A key is asked for by a "question", or by a "cue", the start of the answer alone,
    which a small base model goes on with in a language that it hardly knows; several are asked for by name.

    ValueError if prose is not installed, or the tokenizer does not keep sentences apart.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        language: str,
        held_out: bool,
        rng: random.Random,
        *,
        filler: str = "templates",
        wordings: str = "training",
        asked_by: str = "question",
    ) -> None:
        self.tokenizer, self.held_out, self.rng = tokenizer, held_out, rng
        self.filler, self.wordings = filler, wordings
        self.language: Language = LANGUAGES[language]
        self.question: str = getattr(self.language, asked_by)
        self._known = lru_cache(1 << 16)(self.encode)
        # where digits are tokens of their own, what stands between numbers comes again and is encoded once
        self._digits_apart = self._joins(list("0123456789"))
        self._padding = next((text for text in ("7", " a", " 1") if self._is_padding(text)), "")
        self._taken: set[str] = set()
        if filler == "prose":
            self._documents = prose(language, held_out)
            # a key that stands in the text, or is made of padding, would not be the needle's alone
            numbers = {found for document in self._documents for line in document for found in re.findall(r"\d+", line)}
            self._taken = {found[at : at + KEY_DIGITS] for found in numbers for at in range(len(found))} | {"7" * 5}
            lines = [line for document in self._documents[:20] for line in document]
        else:
            self._pool = [sentence(self.language, held_out, rng) for _ in range(POOL)]
            if not held_out:
                self._pool[::2] = [scrambled(self.language, rng) for _ in self._pool[::2]]
                self._pool[1::8] = [decoy(self.language, rng) for _ in self._pool[1::8]]
            lines = [line.replace("{n}", "10294") for line in self._pool[:200]]
        # contexts are counted sentence by sentence: their text as a whole must have the same tokens
        lines += [needle.format(key="52047") for needle in self.language.needles]
        if not self._padding or not self._joins([f" {line}" for line in lines]):
            raise ValueError(
                "this tokenizer gives sentences other tokens when they are joined, so lengths would be wrong: "
                "expected one that splits before a space and adds nothing in front (byte-level BPE)"
            )

    def _joins(self, texts: list[str]) -> bool:
        """Whether the tokens of the joined texts are those of one after the other."""
        return self.encode("".join(texts)) == [id for text in texts for id in self.encode(text)]

    def _is_padding(self, text: str) -> bool:
        return len(self.encode(text)) == 1 and self._joins([text] * 8)

    def lines(self) -> Iterator[list[int]]:
        """Ids of one haystack sentence after the other, with fresh numbers, without end."""
        drawn = iter(lambda: self.rng.choice(self._pool), "")
        for line in passage(self._documents, self.rng) if self.filler == "prose" else drawn:
            first, *others = f" {line}".split("{n}")
            pieces = [first, *chain.from_iterable((*number(self.rng), piece) for piece in others)]
            yield [*chain.from_iterable(map(self._known, pieces if self._digits_apart else ["".join(pieces)]))]

    def key(self) -> str:
        """A key of `KEY_DIGITS` digits of this side of the split."""
        while True:
            key = "".join(self.rng.choice("0123456789") for _ in range(KEY_DIGITS))
            if is_held_out(key) == self.held_out and key not in self._taken:
                return key

    def statement(self) -> tuple[list[int], str]:
        """Ids of a bare statement of a key, and the key."""
        key = self.key()
        return self.encode(self.language.statement.format(key=key)), key

    def cut(self, ids: list[int], count: int) -> list[int]:
        """A sentence cut to `count` tokens: where that would split a character, padding takes the last places."""
        keep = count
        while self.encode(text := self.tokenizer.decode(ids[:keep])) != ids[:keep] or (
            # padding after a digit of real prose could make a number that is the key
            self.filler == "prose" and keep < count and text[-1:].isdigit()
        ):
            keep -= 1
        return ids[:keep] + self.encode(self._padding * (count - keep))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def draw(self, tokens: int, depth: float | None = None, keys: int = 1) -> tuple[list[int], Sample]:
        """Ids of a context of exactly `tokens` tokens, and the question about one of its keys.

        ValueError if the needles do not fit into `tokens`, or there are fewer names, or wordings, than `keys`.
        """
        rng, language = self.rng, self.language
        known = language.words["name"] if self.wordings == "training" else [""]
        if not 1 <= keys <= len(known):
            raise ValueError(f"{keys} keys with {self.wordings} wordings: expected 1 to {len(known)}")
        asked_depth = rng.random() if depth is None else depth
        names = [""] if keys == 1 else rng.sample(language.words["name"], keys)
        secrets: dict[str, str] = {}
        for name in names:
            while (key := self.key()) in secrets.values():
                pass
            secrets[name] = key
        asked = rng.choice(names)
        wordings = language.needles if keys == 1 else language.named_needles
        if self.wordings == "held_out":
            wordings = language.held_out_needles
        needles = sorted(
            (asked_depth if name == asked else rng.random(), " " + rng.choice(wordings).format(key=key, name=name))
            for name, key in secrets.items()
        )
        ids, starts = self._hidden(needles, tokens)
        start = next(at for at, (_, text) in zip(starts, needles, strict=True) if secrets[asked] in text)
        sample = Sample(
            id="",
            language=language.code,
            context=self.tokenizer.decode(ids),
            question=(self.question if keys == 1 else language.named_question).format(name=asked),
            answer=secrets[asked],
            depth=round(start / tokens, 4),
            tokens=tokens,
            keys=secrets,
            filler=self.filler,
            wordings=self.wordings,
        )
        return ids, sample

    def _hidden(self, needles: list[tuple[float, str]], tokens: int) -> tuple[list[int], list[int]]:
        """`tokens` ids with needles between the sentences, and where those start."""
        encoded = [(at, self.encode(text)) for at, text in needles]
        filler = tokens - sum(len(needle) for _, needle in encoded)
        if filler < 0:
            raise ValueError(f"{tokens} tokens are too few for {len(needles)} needle(s): they take {tokens - filler}")
        ids, starts, waiting = list[int](), list[int](), list[int]()
        used, lines = 0, self.lines()
        for at, needle in [*encoded, (1.0, [])]:
            # whole sentences up to the needle's place; the last stretch is cut to the exact length
            goal = round(at * filler)
            while used < goal:
                line, waiting = waiting or next(lines), []
                if used + len(line) > filler:
                    line = self.cut(line, filler - used)
                if self.filler == "prose" and used + len(line) - goal > goal - used:
                    waiting = line  # sentences of prose can be long: the needle goes to the nearer end
                    break
                used += len(line)
                ids += line
            starts.append(len(ids))
            ids += needle
        return ids, starts[:-1]


def dataset(
    tokenizer: Tokenizer, language: str, tokens: int, samples: int, seed: int = 0, keys: int = 1, **how: str
) -> Iterator[Sample]:
    """Held-out samples with depths spread evenly from front to end; `how` is filler, wordings and asked_by."""
    rng = random.Random(f"{seed}-{language}-{tokens}-{keys}")
    haystack = Haystack(tokenizer, language, True, rng, **how)
    for index in range(samples):
        _, sample = haystack.draw(tokens, (index + 0.5) / samples, keys)
        yield replace(sample, id=f"{language}-{tokens}-{seed}-{index}")
