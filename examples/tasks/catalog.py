"""All tasks by name: what each asks, how it is scored, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tasks.item import Draw, Item
from tasks.lists import common_words, frequent_words, question_among_others, variables
from tasks.needles import NEEDLES, Needles, needles
from tasks.rules import broken
from tasks.verbatim import verbatim

__all__ = ["QUESTION", "TASKS", "Task", "items"]

# a question that every context leaves open shows the form of an answer: an untrained model needs to see it
QUESTION = "\n\nQuestion: How many days are in a week?\nAnswer: seven\n\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Task:
    """A task: `make(draw, index)` is its `index`-th item."""

    about: str
    scores: tuple[str, ...]
    make: Callable[[Draw, int], Item]
    lengths: bool = True  # whether its contexts are made as long as wanted
    squad: bool = False  # whether it needs a file of questions
    prose: bool = False  # whether it needs the packages of passkey/prose.py


def items(name: str, draw: Draw, n: int) -> list[Item]:
    """The first `n` items of a task. ValueError for another name, or where a file or package is missing."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name}: --list shows all")
    if TASKS[name].squad and not draw.paragraphs:
        raise ValueError(f"{name} asks the questions of a file: pass --squad")
    if TASKS[name].squad and n > len(draw.questions):
        raise ValueError(f"{name}: the file holds {len(draw.questions)} questions, asked for {n}")
    return [TASKS[name].make(draw, index) for index in range(n)]


def _squad(draw: Draw, index: int, whole: bool) -> Item:
    paragraph, question = (draw.article_questions if whole else draw.questions)[index]
    longest = max(question.answers, key=len)
    return Item(
        id=question.id,
        context=paragraph.text,
        question=question.text,
        tail=QUESTION.format(question=question.text),
        answers=question.answers,
        scores=("f1", "exact", "contained"),
        new_tokens=draw.room([longest]),
    )


def _about(task: Needles) -> str:
    hay = {"noise": "repeated sentences", "essays": "real prose", "needles": "needles of the same kind"}[task.haystack]
    many = f"{task.keys} keys, {task.asked} asked for, {task.values} values each"
    return f"{task.key} -> {task.value} in {hay}; {many}".replace("1 keys, 1 asked for, 1 values each", "one needle")


TASKS: dict[str, Task] = {
    "squad": Task(
        "SQuAD, a question about its paragraph", ("f1", "exact", "contained"), partial(_squad, whole=False),
        lengths=False, squad=True,
    ),
    "squad_articles": Task(
        "SQuAD, a question about its whole article", ("f1", "exact", "contained"), partial(_squad, whole=True),
        lengths=False, squad=True,
    ),
    **{
        f"{name}{end}": Task(
            f"RULER, {_about(task)}" + ", in Korean" * (language == "ko"), ("recall_all",),
            partial(needles, name, language), prose=task.haystack == "essays",
        )
        for language, end in (("en", ""), ("ko", "_ko"))
        for name, task in NEEDLES.items()
    },
    "vt": Task("RULER, variables that a value is handed along", ("recall_all",), variables),
    "cwe": Task("RULER, the ten most common words of a list", ("recall_all",), common_words),
    "fwe": Task("RULER, the three most frequent words of a text in code", ("recall_all",), frequent_words),
    "qa_1": Task(
        "RULER, a question of SQuAD among other paragraphs", ("recall_part", "f1", "exact"),
        partial(question_among_others, tail=QUESTION), squad=True,
    ),
    "verbatim_contains": Task(
        "repeat the sentence that contains five words", ("repeated", "edit_similarity"),
        partial(verbatim, follows=False), prose=True,
    ),
    "verbatim_follows": Task(
        "repeat the sentence that follows another", ("repeated", "edit_similarity"),
        partial(verbatim, follows=True), prose=True,
    ),
    "rules": Task("which of a system prompt's ten rules a reply breaks", ("chosen",), broken, lengths=False),
}  # fmt: skip
