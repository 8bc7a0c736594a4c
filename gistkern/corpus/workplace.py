"""The folder of a corpus in work: its settings, who works in it, and what killed processes left behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from pathlib import Path
from typing import IO, Any

from gistkern.corpus.chunk_file import ABOUT, FORMAT, SETTINGS
from gistkern.files import DRAFTS, parse_json, read_bytes, replacing

__all__ = ["Workplace"]


class Workplace:
    """A folder that processes write the files of one corpus into; a context manager.

    It is made when it is opened, not before: where the first document is refused nothing has been written.

    Parameters
    ----------
    folder : Path
        Of the corpus.
    settings : dict
        How it is made; the first process writes them, all others agree.
    about : dict
        By what it is made (`ABOUT`); written and not compared.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], about: dict[str, str]) -> None:
        self._folder, self._settings, self._about = folder, settings, about
        self._lock: IO[str] | None = None

    def open(self) -> Path:
        """The folder, which holds this corpus from now on.

        Raises
        ------
        ValueError
            If the settings that are there are others, or are torn, or there are files without any.
        """
        if self._lock is None:
            if self._folder.exists() and not self._folder.is_dir():
                raise ValueError(f"{self._folder} is a file: pass a folder")
            self._folder.mkdir(parents=True, exist_ok=True)
            self._agree()
            self._lock = (self._folder / SETTINGS).open("r+")
            self._tidy()
        return self._folder

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._tidy()
            self._lock.close()

    def _agree(self) -> None:
        """Write the settings, or compare with those that are there."""
        path = self._folder / SETTINGS
        begun = any(self._folder.glob("chunk-*"))  # looked at first: they are written behind the settings
        if not path.exists():
            if begun:
                raise ValueError(f"{self._folder} holds files of a store but no {SETTINGS}: pass another out_dir")
            try:
                with replacing(path, keep=True) as draft:  # whoever comes second agrees with the first
                    draft.write_text(json.dumps({"format": FORMAT, **self._about, **self._settings}, indent=1))
            except FileNotFoundError:  # the first has tidied up already, and our draft away
                if not path.exists():
                    raise
        found = parse_json(read_bytes(path), f"{path} cannot be read, it is torn")
        wanted = {"format": FORMAT, **self._settings}
        names = [*wanted, *(name for name in found if name not in wanted and name not in ABOUT)]
        if different := [name for name in names if found.get(name) != wanted.get(name)]:
            said = ", ".join(f"{name} {found.get(name)!r}, not {wanted.get(name)!r}" for name in different)
            raise ValueError(f"{self._folder} was begun with {said}: pass the same, or another out_dir")

    def _tidy(self) -> None:
        """Take away the drafts of killed processes, if nobody else works here who might be writing one."""
        assert self._lock is not None
        with contextlib.suppress(OSError):  # others are at work, or the file system knows no locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in self._folder.glob(f"{DRAFTS}*"):
                shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # waits for no more than another's tidying
