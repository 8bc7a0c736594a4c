"""Questions about Wikipedia: files in SQuAD's format, drawn by a seed, and the check that nobody trained on them.

A file is SQuAD's own JSON, or JSON lines of ``{"article", "context", "questions": [{"id", "question", "answers"}]}``,
a paragraph each. Both may be gzipped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Paragraph", "Question", "articles", "read_squad", "refuse_trained_on", "shuffled", "trained_on"]


@dataclass(frozen=True)
class Question:
    """A question with its right answers, each as it stands in the paragraph."""

    id: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of an article, and what is asked about it."""

    article: str
    text: str
    questions: tuple[Question, ...]


def read_squad(path: str | Path) -> list[Paragraph]:
    """The paragraphs of a file, in order. ValueError if it holds none, or anything else.

    A question without an answer (SQuAD 2.0 has such) is left out, a paragraph without questions stays: it is part
    of its article.
    """
    try:
        found = [_paragraph(one) for one in _entries(Path(path))]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not in SQuAD's format: {type(error).__name__} {error}") from error
    if not any(one.questions for one in found):
        raise ValueError(f"{path} holds no questions")
    return found


def articles(paragraphs: Sequence[Paragraph]) -> list[Paragraph]:
    """Whole articles: their paragraphs in order, a line each, with all their questions."""
    groups: dict[str, list[Paragraph]] = {}
    for one in paragraphs:
        groups.setdefault(one.article, []).append(one)
    return [
        Paragraph(name, "\n".join(one.text for one in group), tuple(q for one in group for q in one.questions))
        for name, group in groups.items()
    ]


def shuffled(paragraphs: Sequence[Paragraph], seed: int) -> list[tuple[Paragraph, Question]]:
    """All questions in the order of a seed: its first ones are a draw, and more of them begin with fewer."""
    every = [(paragraph, question) for paragraph in paragraphs for question in paragraph.questions]
    random.Random(seed).shuffle(every)
    return every


def trained_on(evaluation: Sequence[Paragraph], training: str | Path) -> list[str]:
    """Articles of the evaluation that stand in a training file, by their title or by the text of any paragraph.

    The training file is in SQuAD's format, or what ``gistkern train --data`` takes: JSON lines with a ``"context"``,
    of which each line of text is looked at, so that paragraphs are found in whole articles, too.
    """
    titles, texts = set(), set()
    for one in _entries(Path(training)):
        if isinstance(one, dict) and isinstance(one.get("context"), str):
            titles.add(_words(str(one.get("article", ""))))
            texts |= {_digest(part) for part in (one["context"], *one["context"].splitlines())}
    if not texts:
        raise ValueError(f"{training} holds no contexts: nothing can be said about what was trained on")
    found = {one.article for one in evaluation if _words(one.article) in titles or _digest(one.text) in texts}
    return sorted(found)


def refuse_trained_on(evaluation: Sequence[Paragraph], training: Sequence[str | Path]) -> None:
    """ValueError if an article of the evaluation stands in any of these training files."""
    for path in training:
        if found := trained_on(evaluation, path):
            names = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
            raise ValueError(f"{len(found)} articles of the evaluation were trained on ({path}): {names}")


def _words(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())


def _digest(text: str) -> str:
    return hashlib.sha256(_words(text).encode()).hexdigest()


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """A file's paragraphs as dicts with article, context and questions, whichever format it has."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        text = content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "data" in whole:
        for article in whole["data"]:
            for paragraph in article["paragraphs"]:
                asked = [{**one, "answers": [answer["text"] for answer in one["answers"]]} for one in paragraph["qas"]]
                yield {"article": article["title"], "context": paragraph["context"], "questions": asked}
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from error


def _paragraph(entry: dict[str, Any]) -> Paragraph:
    asked = [
        # each answer once, though several people gave it
        Question(one["id"], one["question"].strip(), tuple(dict.fromkeys(one["answers"])))
        for one in entry["questions"]
        if one["answers"]
    ]
    return Paragraph(entry["article"], entry["context"], tuple(asked))
