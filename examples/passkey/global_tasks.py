"""Questions whose answer needs the whole context: counting, majority and ordering, in English and Korean.

Statements (global_tasks.yaml) are planted in the passkey haystack at random places, and like the needles they are
deterministic, of an exact number of tokens, and split by a checksum: what evaluation reads, training never did.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from tokenizers import Tokenizer

from passkey.haystack import is_held_out
from passkey.niah import Haystack, Sample

__all__ = ["TASKS", "WORDINGS", "GlobalSample", "GlobalTask", "dataset"]

# by task and language: statements, held_out statements and questions
WORDINGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))

MOST = 9  # events of one kind: the count is one digit
CANDIDATES = 4
TRAVELLERS = 5


@dataclass(frozen=True, kw_only=True)
class GlobalSample(Sample):
    """A question about the whole context.

    `answer` is one of `choices`, the words or numbers that count as an answer; `chance` is the score of a guess
    among those that the question or the context leaves open. `keys` says what was planted.
    """

    task: str
    choices: tuple[str, ...]
    chance: float


@dataclass(frozen=True)
class _Plan:
    """What to plant, in this order, and what to ask about it."""

    statements: list[str]
    question: str
    answer: str
    choices: tuple[str, ...]
    chance: float
    facts: dict[str, str]


class GlobalTask:
    """Draws contexts and questions of one task, on the side of the split that its haystack is on.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    haystack : Haystack
        The filler, the language and wordings, the tokenizer and the only source of chance.
    """

    def __init__(self, name: str, haystack: Haystack) -> None:
        if name not in TASKS:
            raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}")
        self.name, self.haystack = name, haystack
        wording = WORDINGS[name][haystack.language.code]
        self.held_out: list[str] = wording["held_out"]
        self.templates = self.held_out if haystack.wordings == "held_out" else wording["statements"]
        self.questions: list[str] = wording["questions"]
        self.words = haystack.language.words

    def draw(self, tokens: int) -> tuple[list[int], GlobalSample]:
        """Ids of a context of exactly `tokens` tokens, and the question about it."""
        plan = TASKS[self.name](self, self.haystack.rng)
        ids, context = self._spread(plan.statements, tokens)
        sample = GlobalSample(
            id="",
            language=self.haystack.language.code,
            context=context,
            question=plan.question,
            answer=plan.answer,
            depth=0.0,  # the statements are everywhere
            tokens=len(ids),
            keys=plan.facts,
            filler=self.haystack.filler,
            wordings=self.haystack.wordings,
            task=self.name,
            choices=plan.choices,
            chance=plan.chance,
        )
        return ids, sample

    def say(self, **fixed: str) -> str:
        """One statement of this side of the split about `fixed` words; the others are drawn."""
        rng = self.haystack.rng
        while True:
            words = {slot: rng.choice(choices) for slot, choices in self.words.items()} | fixed
            template = rng.choice(self.templates)
            statement = template.format(**words)
            if template in self.held_out or is_held_out(statement) == self.haystack.held_out:
                return statement

    def _spread(self, statements: list[str], tokens: int) -> tuple[list[int], str]:
        """The statements in their order at random places of the filler, in `tokens` tokens together."""
        encoded = [(text, self.haystack.encode(text)) for text in (f" {statement}" for statement in statements)]
        filler = tokens - sum(len(ids) for _, ids in encoded)
        if filler < 0:
            raise ValueError(
                f"{tokens} tokens are too few for the {self.name} task: its statements take {tokens - filler}"
            )
        places = sorted(self.haystack.rng.randint(0, filler) for _ in encoded)
        ids: list[int] = []
        pieces: list[str] = []
        used = 0
        lines = self.haystack.lines()
        for place, (text, statement) in [*zip(places, encoded, strict=True), (filler, ("", []))]:
            while used < place:
                line, line_ids = next(lines)
                if used + len(line_ids) > filler:
                    line, line_ids = self.haystack.cut(line_ids, filler - used)
                used += len(line_ids)
                ids += line_ids
                pieces.append(line)
            ids += statement
            pieces.append(text)
        return ids, "".join(pieces)


def _counting(task: GlobalTask, rng: random.Random) -> _Plan:
    """How often one bell was rung, while up to as many rings of two other bells distract."""
    asked, *others = rng.sample(task.words["place"], 3)
    counts = {asked: rng.randint(1, MOST), **dict.fromkeys(others, 0)}
    for _ in range(rng.randint(0, MOST)):
        counts[rng.choice(others)] += 1
    statements = [task.say(place=place) for place, count in counts.items() for _ in range(count)]
    rng.shuffle(statements)
    question = task.questions[0].format(place=asked)
    choices = tuple(str(count) for count in range(1, MOST + 1))
    facts = {place: str(count) for place, count in counts.items()}
    return _Plan(statements, question, str(counts[asked]), choices, 1 / MOST, facts)


def _majority(task: GlobalTask, rng: random.Random) -> _Plan:
    """Which candidate got the most votes; all got at least one, and the winner is alone in front."""
    candidates = rng.sample(task.words["things"], CANDIDATES)
    winner = rng.choice(candidates)
    most = rng.randint(2, 5)
    votes = {candidate: most if candidate == winner else rng.randint(1, most - 1) for candidate in candidates}
    statements = [task.say(things=candidate) for candidate, count in votes.items() for _ in range(count)]
    rng.shuffle(statements)
    facts = {candidate: str(count) for candidate, count in votes.items()}
    return _Plan(statements, task.questions[0], winner, task.words["things"], 1 / CANDIDATES, facts)


def _ordering(task: GlobalTask, rng: random.Random) -> _Plan:
    """Who of two travellers set out first, or last: the text tells it in the order in which it happened."""
    travellers = rng.sample(task.words["name"], TRAVELLERS)
    pair = rng.sample(travellers, 2)
    which = rng.randrange(2)
    question = task.questions[which].format(a=pair[0], b=pair[1])
    answer = (min, max)[which](pair, key=travellers.index)
    facts = {traveller: str(place) for place, traveller in enumerate(travellers, start=1)}
    statements = [task.say(name=name) for name in travellers]
    return _Plan(statements, question, answer, task.words["name"], 1 / 2, facts)


TASKS: dict[str, Callable[[GlobalTask, random.Random], _Plan]] = {
    "counting": _counting,
    "majority": _majority,
    "ordering": _ordering,
}


def dataset(
    tokenizer: Tokenizer,
    task: str,
    language: str,
    tokens: int,
    samples: int,
    *,
    seed: int = 0,
    filler: str = "templates",
    wordings: str = "training",
) -> Iterator[GlobalSample]:
    """Held-out samples of one task."""
    rng = random.Random(f"{seed}-{task}-{language}-{tokens}")
    drawn = GlobalTask(task, Haystack(tokenizer, language, True, rng, filler=filler, wordings=wordings))
    for index in range(samples):
        _, sample = drawn.draw(tokens)
        yield replace(sample, id=f"{task}-{language}-{tokens}-{seed}-{index}")
