"""What all commands share: arguments looked at before anything is loaded, mistakes answered in one line."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Parser", "at_least", "errors_as_one_line", "input_folder", "input_path", "output_path"]


class Parser(argparse.ArgumentParser):
    """argparse's, which takes whole option names only and suggests the one that was meant."""

    def __init__(self, **kwargs: Any) -> None:
        how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**how | kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Exit with status 2, in one line; an unknown word is followed by the known one that it resembles."""
        known = [option for action in self._actions for option in action.option_strings]
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        for word in unknown:
            if near := difflib.get_close_matches(word, known, n=1):
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return whole_number


def _path_if(good: Callable[[Path], bool], message: str) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        if not text:
            raise argparse.ArgumentTypeError("it is empty, which would be this folder")
        if not good(Path(text)):
            raise argparse.ArgumentTypeError(message.format(text))
        return Path(text)

    return path


def _is_writable(path: Path) -> bool:
    """Whether a folder is there and may be written to, or can be made so in the nearest folder that is."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


input_path = _path_if(Path.exists, "no file or folder {}")
input_folder = _path_if(Path.is_dir, "no folder {}")
output_path = _path_if(_is_writable, "cannot write to a folder {}")


@contextmanager
def errors_as_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turn what is wrong with a user's files, names, settings and installation into one line and exit status 2."""
    try:
        yield
    except BrokenPipeError:  # `gistkern doctor | head`: who read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
