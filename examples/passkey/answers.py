"""Answers as JSON lines, written as they come: a killed evaluation loses none and goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from passkey.metrics import Answer

__all__ = ["AnswerFile"]


class AnswerFile:
    """The answers of one evaluation, in one file; without a `path` nothing is kept.

    `model` tells the weights and how they read (`Reader.digest`), `wanted` the samples that this evaluation asks. What
    was answered before is `done`, by the sample's digest. ValueError if a line other than the last is torn, or the
    answers are of another evaluation; with `overwrite` it starts afresh then.
    """

    def __init__(self, path: Path | None, model: str, wanted: Iterable[str], overwrite: bool = False) -> None:
        self.path, self.model, self.done = path, model, dict[str, Answer]()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = _read(path, model, set(wanted)) if path.exists() else []
        except ValueError as error:
            if not overwrite:
                raise ValueError(f"{error}: choose another output folder, or overwrite it") from error
            found = []
        self.done = {answer.digest: answer for answer in found}
        temporary = path.with_suffix(".tmp")  # without what was torn, replaced in one step
        temporary.write_text(_lines(found), encoding="utf-8")
        os.replace(temporary, path)

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers; they are on disk when this returns."""
        answers = list(answers)
        self.done |= {answer.digest: answer for answer in answers}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as out:
                out.write(_lines(answers))
                out.flush()
                os.fsync(out.fileno())


def _lines(answers: Iterable[Answer]) -> str:
    return "".join(json.dumps({**asdict(a), "exact": a.exact}, ensure_ascii=False) + "\n" for a in answers)


def _read(path: Path, model: str, wanted: set[str]) -> list[Answer]:
    """What `model` answered to the `wanted` questions, without the last line if a kill tore it."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            found.append(Answer(**{field.name: entry[field.name] for field in fields(Answer)}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no answer ({error})") from error
    if any(answer.model != model or answer.digest not in wanted for answer in found):
        raise ValueError(f"{path} holds answers of another checkpoint, another way of reading or other questions")
    return found
