"""Documents from folders, text files and JSON lines, as a command is given them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gistkern.corpus.lines import Lines

__all__ = ["SUFFIXES", "Texts"]

SUFFIXES = (".txt", ".md", ".rst", ".jsonl")


class Texts:
    """Names and contents of all documents below some paths, read as they are asked for, as often as they are.

    A folder's files are called by their path inside it, a file that is given itself by its name; the documents of a
    ``.jsonl`` by the ids in it.

    Parameters
    ----------
    paths : sequence of Path
        Folders, whose files that end in one of `SUFFIXES` are read (hidden ones are not), and files, which are read
        whatever they are called.

    Attributes
    ----------
    left_out : int
        Files in the folders that are none of those.

    Raises
    ------
    ValueError
        If a path is none that can be read twice, or a folder holds no documents; while they are read, for a file or
        line that holds none, naming it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.left_out = 0
        self._files: list[tuple[str, Path]] = []
        self._lines: list[Lines] = []
        for path in paths:
            found = self._below(path) if path.is_dir() else [(path.name, path)]
            self._lines += [Lines(file) for _, file in found if _suffix(file) == ".jsonl"]
            self._files += [(name, file) for name, file in found if _suffix(file) != ".jsonl"]
        for _, file in self._files:
            if not file.is_file():
                why = "is no regular file: it is read twice, so write what comes from a pipe to a file"
                raise ValueError(f"{file} {why if file.exists() else 'does not exist'}")

    def _below(self, folder: Path) -> list[tuple[str, Path]]:
        inside = [(file.relative_to(folder), file) for file in sorted(folder.rglob("*")) if file.is_file()]
        shown = [(name, file) for name, file in inside if not any(part.startswith(".") for part in name.parts)]
        found = [(name.as_posix(), file) for name, file in shown if _suffix(file) in SUFFIXES]
        self.left_out += len(shown) - len(found)
        if not found:
            raise ValueError(f"the folder {folder} holds no documents: they end in {', '.join(SUFFIXES)}")
        return found

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, file in self._files:
            yield name, _text(file)
        for lines in self._lines:
            yield from lines

    def where(self, name: str) -> str:
        """The files and lines of documents called `name`, in words."""
        places = [str(file) for known, file in self._files if known == name]
        places += [found for lines in self._lines if (found := lines.where(name)) != str(lines.path)]
        return " and ".join(places) or ", ".join(str(lines.path) for lines in self._lines)


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is no UTF-8 ({error.reason}): save the file as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
