"""What these scripts' command lines share: arguments looked at before anything is loaded, errors as one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["at_least", "errors_as_one_line", "input_file", "input_folder", "output_folder"]


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return whole_number


def _path_if(good: Callable[[Path], bool], message: str) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        if not good(Path(text)):
            raise argparse.ArgumentTypeError(message.format(text))
        return Path(text)

    return path


def _is_writable(folder: Path) -> bool:
    """Whether it is there and may be written to, or can be made so in the nearest folder that is."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


input_file = _path_if(Path.is_file, "no file {}")
input_folder = _path_if(Path.is_dir, "no folder {}")
output_folder = _path_if(_is_writable, "cannot write to a folder {}")


@contextmanager
def errors_as_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn what is wrong with a user's files, names and settings into argparse's message and exit status 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        parser.error(" ".join(str(error).split()))
