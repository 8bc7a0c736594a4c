"""Answers as JSON lines in a gzipped file, each on disk as it comes: a killed run loses none and goes on."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Record", "read_record"]

CELL = ("task", "length", "method", "ratio", "item")


class Record:
    """The answers of one method in one file, whose first line says what was run.

    Every batch of lines is a gzip member of its own, so a kill can tear the last one alone: that is cut off. ValueError
    if the file is of another run, or is damaged anywhere else.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run, self.lines = path, run, list[dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or not path.stat().st_size:
            self._append([run])
            return
        found, self.lines, whole = read_record(path)
        if found != run:
            other = sorted(name for name in {*found, *run} if found.get(name) != run.get(name))
            raise ValueError(f"{path} holds answers of another {' and '.join(other)}: choose another output folder")
        if whole < path.stat().st_size:
            os.truncate(path, whole)

    @property
    def done(self) -> set[tuple[Any, ...]]:
        """What was answered, by task, length, method, ratio and item."""
        return {tuple(line[name] for name in CELL) for line in self.lines}

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append answers; they are on disk when this returns."""
        lines = list(lines)
        self._append(lines)
        self.lines += lines

    def _append(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("ab") as out:
            out.write(gzip.compress(text.encode(), mtime=0))
            out.flush()
            os.fsync(out.fileno())


def read_record(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """What was run, the answers, and how many bytes of the file are whole: fewer than it has if its end is torn."""
    content, lines, at = path.read_bytes(), list[dict[str, Any]](), 0
    while at < len(content):
        member = zlib.decompressobj(wbits=31)
        try:
            text = member.decompress(content[at:])
        except zlib.error as error:
            raise ValueError(f"{path} is damaged at byte {at}: {error}") from error
        if not member.eof:
            break
        try:
            lines += [json.loads(line) for line in text.decode().splitlines()]
        except ValueError as error:
            raise ValueError(f"{path} holds a line that is no JSON at byte {at}: {error}") from error
        at = len(content) - len(member.unused_data)
    if not lines:
        raise ValueError(f"{path} holds no answers: remove it")
    return lines[0], lines[1:], at
