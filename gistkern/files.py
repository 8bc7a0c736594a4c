"""Files that are written whole or not at all, and JSON that is read strictly: for caches and corpora on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import reprlib
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["DRAFTS", "UnreadableError", "field_of", "parse_json", "read_bytes", "replacing"]

DRAFTS = ".gistkern-"  # how the folders begin in which files are written before they take their names


class UnreadableError(ValueError):
    """A file is there and cannot be read, which says nothing about what it holds."""

    def __init__(self, path: str | os.PathLike, error: OSError) -> None:
        super().__init__(f"{path} cannot be read ({error.strerror}): it may be whole")


@contextlib.contextmanager
def replacing(path: str | os.PathLike, keep: bool = False) -> Iterator[Path]:
    """A path to write a file at; at the end of the block the file takes the name `path`, in one step.

    Both the bytes and the name are on disk then. A block that fails leaves what was there. Other threads, processes
    and machines may write the same file: the name of the draft is nobody else's. With `keep` a file that is there
    already stays.

    Raises
    ------
    OSError
        Before the block, where `path` is a folder, a device or a pipe, lies in no folder that can be written, or has
        too long a name.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder: pass the name of a file", str(target))
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(target).st_mode  # raises where the name is too long
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):  # /dev/null, say, which whoever may would replace
            raise OSError(
                errno.EINVAL, "this is no regular file, and would be replaced: pass another name", str(target)
            )
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder: make it first", str(target.parent))
    # a folder of our own, because safetensors writes through a draft of its own beside the file
    with tempfile.TemporaryDirectory(prefix=DRAFTS, dir=target.parent, ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / "draft"
        # the mode that a new file gets here; asking for the umask would set it, for all threads
        new = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = os.fstat(new).st_mode & 0o777
        os.close(new)
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(draft, mode)  # safetensors' files are private
        if keep:
            with contextlib.suppress(FileExistsError):
                os.link(draft, target)
        else:
            os.replace(draft, target)
        if hasattr(os, "O_DIRECTORY"):
            parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)


def read_bytes(path: str | os.PathLike) -> bytes:
    """All of a file; UnreadableError where it is there and cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise OSError(errno.EINVAL, "it is no regular file")  # a pipe has no end to wait for
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(path, error) from error


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object; ValueError, beginning with `where`, for anything else: NaN, a nesting bomb, two equal names."""
    try:
        found = json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: no JSON object but {reprlib.repr(found)}")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def field_of(found: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of exactly one type (True is no int); ValueError naming `where` and the field."""
    if name not in found:
        raise ValueError(f"{where} lacks {name}")
    if type(found[name]) is not kind:
        raise ValueError(f"{where}: {name} must be {kind.__name__}, found {reprlib.repr(found[name])}")
    return found[name]
