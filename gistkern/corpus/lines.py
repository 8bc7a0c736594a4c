"""Documents of a JSON-lines file, and where in it one stands."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gistkern.files import parse_json

__all__ = ["Lines"]


class Lines:
    """Names and contents, read as they are asked for, as often as they are.

    Parameters
    ----------
    path : Path
        Each line that is not blank is {"id": "...", "text": "..."}; other fields are left alone.

    Raises
    ------
    ValueError
        If the file is none that can be read twice; while it is read, for a line that holds no document, naming it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise ValueError(f"{path} is a folder: pass a file of JSON lines")
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if not path.is_file():
            raise ValueError(f"{path} is no regular file: it is read twice, so write what comes from a pipe to a file")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for _, name, content in self._entries():
            yield name, content

    def where(self, name: str) -> str:
        """The lines of documents called `name`, in words."""
        numbers = []
        with contextlib.suppress(ValueError):  # a line behind those that are asked for
            for number, known, _ in self._entries():
                if known == name:
                    numbers.append(number)
        if not numbers:
            return str(self.path)
        said = ", ".join(str(number) for number in numbers)
        return f"{self.path}, line{'s' * (len(numbers) > 1)} {said}"

    def _entries(self) -> Iterator[tuple[int, str, Any]]:
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")  # as editors write it in front of UTF-8
                    if line.strip():
                        yield number, *_entry(line, f"{self.path}, line {number}, is no document")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror})") from error


def _entry(line: bytes, where: str) -> tuple[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is no UTF-8 ({error.reason}): save the file as UTF-8") from error
    entry = parse_json(text, where)
    for field in ("id", "text"):
        if field not in entry:
            raise ValueError(f'{where}: it lacks {field!r}, expected {{"id": ..., "text": ...}}')
    name = entry["id"]
    if type(name) not in (str, int):
        raise ValueError(f"{where}: its id must be a string or a whole number, found {reprlib.repr(name)}")
    return str(name), entry["text"]
