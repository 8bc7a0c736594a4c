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


def _checked(text: str, folder: bool, mode: int) -> Path:
    """The path, if it is what is wanted, or can be made so, and may be used."""
    path = Path(text)
    if path.exists() and path.is_dir() != folder:
        found, wanted = ("file", "folder") if folder else ("folder", "file")
        raise argparse.ArgumentTypeError(f"{text} is a {found}: expected a {wanted}")
    # what is to be made needs the nearest folder that is there
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if there != path and mode == os.R_OK:
        raise argparse.ArgumentTypeError(f"no folder {text}" if folder else f"{text} does not exist")
    if there != path and not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file: expected a folder")
    if not os.access(there, mode | (os.X_OK if there.is_dir() else 0)):
        raise argparse.ArgumentTypeError(f"no permission to {'read' if mode == os.R_OK else 'write to'} {there}")
    return path


def input_file(text: str) -> Path:
    """An argument's type: a file that can be read."""
    return _checked(text, False, os.R_OK)


def input_folder(text: str) -> Path:
    """An argument's type: a folder that is there."""
    return _checked(text, True, os.R_OK)


def output_file(text: str) -> Path:
    """An argument's type: a file to write, in a folder that is there or to be made."""
    return _checked(text, False, os.W_OK)


def output_folder(text: str) -> Path:
    """An argument's type: a folder to write to, there or to be made."""
    return _checked(text, True, os.W_OK)


@contextmanager
def errors_as_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn what is wrong with a user's files, names and settings into argparse's message and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        parser.error(" ".join(str(error).split()))
