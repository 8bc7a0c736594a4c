"""The report of an evaluation: report.json with one row a line, and a table on the terminal."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["command_line", "environment", "read_json", "show", "write_json", "write_report"]

CELLS = (
    "{tokens:,}|{gist_tokens:,}|{ratio:.0f}x|{n}|{exact:.1%}|{wilson_low:.1%} to {wilson_high:.1%}"
    "|{digit:.1%}|{hallucinated:.1%}|{abstained:.1%}"
)
HEAD = ["questions", "tokens", "rows", "ratio", "n", "exact", "95 % interval", "digits", "hallucinated", "abstained"]
WIDEST = 100  # columns of a terminal


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json into a folder, and print the tables.

    `report` has "rows" of `metrics.rows_of`, perhaps "full_context" with those of the same questions when the whole
    context was in sight, and whatever else is to be kept.
    """
    found = {**report, "environment": environment("gistkern", "torch", "transformers")}
    write_json(folder / "report.json", found)
    print(show(report["rows"]))
    if report.get("full_context"):
        print(f"\nthe same questions with the whole context in sight:\n{show(report['full_context'])}")
    print(f"\n{folder / 'report.json'}; what the columns mean: docs/reference/metrics.md")


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for a terminal, of at most 100 columns: what has no room goes on in the next line."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in HEAD:
        first = name == HEAD[0]
        table.add_column(name, justify="left" if first else "right", no_wrap=not first)
    for row in rows:
        table.add_row(_label(row), *CELLS.format(**row).split("|"))
    page = StringIO()
    Console(file=page, width=WIDEST, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().rstrip("\n").split("\n"))


def _label(row: Mapping[str, Any]) -> str:
    """What a row's questions are, without their length: the differences from plain passkeys are spelled out."""
    keys, filler = f"{row['keys']} keys" * (row["keys"] > 1), row["filler"].removesuffix("templates")
    parts = [row["language"], keys, filler, "held-out wordings" * (row["wordings"] == "held_out")]
    return ", ".join(filter(None, parts))


def read_json(path: Path) -> Any:
    """What a file holds; ValueError names the file if that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file in one step, and the folder that it belongs to: a line per key, and per item of a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = ",\n".join(f"{json.dumps(key)}: {_lines(item)}" for key, item in value.items())
    temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    os.replace(temporary, path)


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        return json.dumps(value, ensure_ascii=False)
    return "[\n" + ",\n".join(f" {json.dumps(item, ensure_ascii=False)}" for item in value) + "\n]"


def environment(*packages: str) -> dict[str, Any]:
    """The machine, the threads of this process, and the versions of Python and of packages."""
    import torch  # takes seconds to load

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def command_line(script: str, arguments: Sequence[str] | None) -> str:
    """The command line of one of these scripts, whose `main` was given `arguments`."""
    return shlex.join(["python", f"examples/{script}", *(sys.argv[1:] if arguments is None else arguments)])
