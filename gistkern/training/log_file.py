"""Logs of one JSON object per line, of runs that may be killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["entries_before"]


def entries_before(path: Path, step: int) -> str:
    """The lines of a log below `step`, at which a run goes on and will write its own.

    A line torn by a kill ends the log; a file that is not there is an empty one.
    """
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] < step:
            kept.append(line + "\n")
    return "".join(kept)
