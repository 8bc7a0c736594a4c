"""What these scripts' command lines share: arguments looked at before anything is loaded, errors as one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["at_least", "errors_as_one_line", "input_file", "input_folder", "output_file", "output_folder"]


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: whole numbers from `least` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return number


def input_file(text: str) -> Path:
    """An argument's type: a file that can be read."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: expected a file")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return _allowed(path, path, os.R_OK, "read")


def input_folder(text: str) -> Path:
    """An argument's type: a folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} is a file: expected a folder" if path.exists() else f"no folder {text}"
        )
    return _allowed(path, path, os.R_OK | os.X_OK, "read")


def output_folder(text: str) -> Path:
    """An argument's type: a folder to write to, there or to be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file: expected a folder")
    return _allowed(path, _existing(path), os.W_OK | os.X_OK, "write to")


def output_file(text: str) -> Path:
    """An argument's type: a file to write, in a folder that is there or to be made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: expected a file")
    where = path if path.exists() else _existing(path.parent)
    return _allowed(path, where, os.W_OK if path.exists() else os.W_OK | os.X_OK, "write")


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    found = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not found.is_dir():
        raise argparse.ArgumentTypeError(f"{found} is a file: expected a folder")
    return found


def _allowed(path: Path, where: Path, mode: int, what: str) -> Path:
    if not os.access(where, mode):
        raise argparse.ArgumentTypeError(f"no permission to {what} {where}")
    return path


@contextmanager
def errors_as_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn what is wrong with a user's files, names and settings into argparse's message and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        parser.error(" ".join(str(error).split()))
