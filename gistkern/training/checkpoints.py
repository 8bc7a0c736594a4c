"""A run's folder: whether it is free, which of its checkpoints are whole, and whether a run may go on in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["SETTINGS", "check_unused", "how_to_go_on", "newest_whole", "step_of", "to_resume"]

SETTINGS = "training.json"
_STATE = "trainer_state.json"
_WRITTEN_FIRST = {SETTINGS, "log.jsonl", "runs"}  # by a run that has no checkpoint yet
_LENGTH = {"run.steps", "run.epochs"}  # a run may be made longer


def newest_whole(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None: a Trainer writes its state last."""
    whole = [path for path in Path(folder).glob("checkpoint-[0-9]*") if _is_whole(path)]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, which its name says."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / _STATE).read_text())
    except (OSError, ValueError):
        return False
    return path.name.removeprefix("checkpoint-").isdecimal()


def check_unused(output: Path) -> None:
    """Raise ValueError if a folder holds more than what a run without a checkpoint leaves."""
    found = {path.name for path in output.iterdir()} if output.exists() else set()
    if found - _WRITTEN_FIRST:
        raise ValueError(f"{output} is in use: pass --resume to go on with its run, or another --output")


def to_resume(output: Path, written: Mapping[str, Any] | None = None) -> Path:
    """The checkpoint that a run goes on from; ValueError if there is none.

    With `written`, the settings, also if they are another run's: all but the number of steps must be as they were.
    """
    checkpoint, file = newest_whole(output), output / SETTINGS
    if checkpoint is None or not file.is_file():
        raise ValueError(f"nothing to resume: {output} holds no whole checkpoint; leave --resume out to start")
    if written is not None:
        flat, before = _flat(written), _flat(json.loads(file.read_text("utf-8")))
        different = [name for name in {**before, **flat} if flat.get(name) != before.get(name)]
        if not set(different) <= _LENGTH:
            said = ", ".join(f"{name} {before.get(name)!r}, now {flat.get(name)!r}" for name in different)
            raise ValueError(
                f"{output} is a run of other settings or rows ({said}): pass the same (only --steps or --epochs may "
                "grow), or another --output"
            )
    return checkpoint


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            found[name] = value
    return found


def how_to_go_on(output: Path) -> str:
    """What to say where a run was stopped."""
    if (whole := newest_whole(output)) is not None:
        return f"{whole} is whole, and the same command with --resume goes on from there"
    return f"{output} holds no whole checkpoint yet: the same command starts again"
