"""Answers as JSON lines, written as they come: a killed evaluation loses none and goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from passkey.metrics import Answer
from passkey.niah import Sample

__all__ = ["AnswerFile"]


class AnswerFile:
    """The answers of one evaluation, in one file; without a `path` nothing is kept.

    `model` tells the weights and how they read (`Reader.digest`); `samples` are those that this evaluation asks,
    and `done` what was answered before, by their digests. ValueError if a line other than the last is torn, or the
    answers are of another evaluation; with `overwrite` it starts afresh then.
    """

    def __init__(self, path: Path | None, model: str, samples: Mapping[str, Sample], overwrite: bool = False) -> None:
        self.path, self.model, self.done = path, model, dict[str, Answer]()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = self._read(path, samples) if path.exists() else []
        except ValueError as error:
            if not overwrite:
                raise ValueError(f"{error}: choose another output folder, or overwrite it") from error
            found = []
        self.done = {answer.sample.digest: answer for answer in found}
        temporary = path.with_suffix(".tmp")  # without what was torn, replaced in one step
        temporary.write_text(self._lines(found), encoding="utf-8")
        os.replace(temporary, path)

    def add(self, answers: Iterable[Answer]) -> None:
        """Append answers; they are on disk when this returns."""
        answers = list(answers)
        self.done |= {answer.sample.digest: answer for answer in answers}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as out:
                out.write(self._lines(answers))
                out.flush()
                os.fsync(out.fileno())

    def _lines(self, answers: Iterable[Answer]) -> str:
        lines = ""
        for one in answers:
            shown = {name: getattr(one.sample, name) for name in ("digest", "id", "depth", "answer")} | one.kind
            shown |= {name: getattr(one, name) for name in ("said", "rows", "row_bytes", "outcome", "digits", "exact")}
            lines += json.dumps({"model": self.model, **shown}, ensure_ascii=False) + "\n"
        return lines

    def _read(self, path: Path, samples: Mapping[str, Sample]) -> list[Answer]:
        """What was answered, without the last line if a kill tore it."""
        found = []
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                entry = json.loads(line)
                model, digest, *said = (entry[name] for name in ("model", "digest", "said", "rows", "row_bytes"))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no answer ({error})") from error
            if model != self.model or digest not in samples:
                raise ValueError(
                    f"{path} holds answers of another checkpoint, another way of reading or other questions"
                )
            found.append(Answer(samples[digest], *said))
        return found
