"""Checkpoints of a run's folder: which are whole."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["newest_whole"]

_STATE = "trainer_state.json"


def newest_whole(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None: a Trainer writes its state last."""
    whole = [path for path in Path(folder).glob("checkpoint-[0-9]*") if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / _STATE).read_text())
    except (OSError, ValueError):
        return False
    return path.name.removeprefix("checkpoint-").isdecimal()
