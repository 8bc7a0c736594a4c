"""What every result file has in common: JSON that is whole or not there, where it was measured, Markdown tables."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["command_line", "environment", "environment_line", "table", "write_json"]


def write_json(path: Path, value: Any) -> None:
    """Write a file in one step, and the folder that it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def environment(*packages: str) -> dict[str, Any]:
    """The machine, the threads of this process, and the versions of Python and of packages."""
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
