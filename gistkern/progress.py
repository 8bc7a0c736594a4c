"""What a person at a terminal sees while something takes long; in files and pipes, and of other ranks, nothing."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["announce", "bar", "is_watched"]


def is_watched() -> bool:
    """Whether this is a run's first process and its standard error is a terminal."""
    return os.environ.get("RANK", "0") == "0" and sys.stderr is not None and sys.stderr.isatty()


def announce(what: str) -> None:
    """Say what is waited for from here on: one line, such as "loading runs/mine ..."."""
    if is_watched():
        print(f"{what} ...", file=sys.stderr, flush=True)


def bar(hidden: bool | None = False, **given: Any) -> tqdm:
    """tqdm's bar, which goes away when it is done; `given` are tqdm's arguments, `hidden` draws none."""
    from tqdm import tqdm

    return tqdm(**{"leave": False, "dynamic_ncols": True, **given, "disable": hidden or not is_watched()})
