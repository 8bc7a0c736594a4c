"""The report of an evaluation: report.json with one row a line, a heatmap by depth, and a table on the terminal."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["command_line", "environment", "read_json", "show", "write_json", "write_report"]

Rows = Sequence[Mapping[str, Any]]
CELLS = (
    "{tokens:,}|{gist_tokens:,}|{ratio:.0f}x|{n}|{exact:.1%}|{wilson_low:.1%} to {wilson_high:.1%}"
    "|{digit:.1%}|{hallucinated:.1%}|{abstained:.1%}"
)
HEAD = ["questions", "tokens", "rows", "ratio", "n", "exact", "95 % interval", "digits", "hallucinated", "abstained"]


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and heatmap.png into a folder, and print the tables.

    `report` has "rows" of `metrics.rows_of`, perhaps "full_context" with those of the same questions when the whole
    context was in sight, and whatever else is to be kept.
    """
    found = {**report, "environment": environment("gistkern", "torch", "transformers")}
    write_json(folder / "report.json", found)
    heatmap(report["rows"], folder / "heatmap.png")
    print(show(report["rows"]))
    if report.get("full_context"):
        print(f"\nthe same questions with the whole context in sight:\n{show(report['full_context'])}")
    print(f"\n{folder / 'report.json'}; what the columns mean: docs/metrics.md")


def show(rows: Rows) -> str:
    """The rows as a table for a terminal; a "method" stands in front where rows have one."""
    lines = [HEAD, *([_label(row), *CELLS.format(**row).split("|")] for row in rows)]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in lines)


def _label(row: Mapping[str, Any]) -> str:
    """What a row's questions are, without their length: the differences from plain passkeys are spelled out."""
    parts = [row.get("method"), row["language"]]
    parts.append(f"{row['keys']} keys" if row["keys"] > 1 else None)
    parts.append(row["filler"] if row["filler"] != "templates" else None)
    parts.append("held-out wordings" if row["wordings"] == "held_out" else None)
    return ", ".join(filter(None, parts))


def heatmap(rows: Rows, path: Path) -> None:
    """Draw exact match by depth (across) and length (down)."""
    known = sorted(rows, key=lambda row: (_label(row), row["tokens"]))
    from matplotlib.figure import Figure  # takes a second to load

    cells = [[math.nan if cell["exact"] is None else cell["exact"] for cell in row["by_depth"]] for row in known]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(known)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    names = [f"{_label(row)} {row['tokens']:,} ({row['ratio']:.0f}x)" for row in known]
    axes.set_yticks(range(len(known)), names)
    axes.set_xticks(range(len(cells[0])), [f"{cell['depth']:.0%}" for cell in known[0]["by_depth"]])
    axes.set(xlabel="depth of the needle", ylabel="context tokens", title="exact match from the gist rows alone")
    figure.colorbar(image, label="exact match")
    figure.savefig(path, dpi=120)


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
