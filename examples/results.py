"""What every run's files have in common: JSON that is whole or not there, where it was measured, Markdown tables."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["command_line", "environment", "environment_line", "newest_whole", "read_json", "table", "write_json"]


def read_json(path: Path, *keys: str) -> Any:
    """What a file holds; ValueError names the file if that is no JSON, or no object with these keys."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a file in one step, and the folder that it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end, by train_niah.py or transformers' Trainer, or None.

    The file with the counters is the last that either writes.
    """
    whole = [
        (int(number[1]), path)
        for path in run.glob("checkpoint-*")
        if (number := re.fullmatch(r"checkpoint-(\d+)", path.name))
        and any((path / name).is_file() for name in ("progress.json", "trainer_state.json"))
    ]
    return max(whole, default=(0, None))[1]


def environment(*packages: str) -> dict[str, Any]:
    """The machine, the threads of this process, and the versions of Python and of packages."""
    import torch  # only here: takes longer to load than many a script that writes a table needs

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def command_line(script: str, arguments: Sequence[str] | None) -> str:
    """The command line of one of these scripts, whose `main` was given `arguments`."""
    return shlex.join(["python", f"examples/{script}", *(sys.argv[1:] if arguments is None else arguments)])


def environment_line(found: Mapping[str, Any]) -> str:
    """`environment` in words."""
    threads = "one thread" if found["threads"] == 1 else f"{found['threads']} threads"
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"{found['machine']}, {threads}, {versions}"


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows)]
