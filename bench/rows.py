"""Reports as JSON with one row a line: what changed is one line of a diff, and a file is as long as it has rows.

A report is a dictionary: a header of short values, and tables, which are lists of rows. `dumps` writes each of its keys
on a line of its own, and a table's rows on a line each. Any JSON reader reads it.
"""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def dumps(report: dict[str, Any]) -> str:
    """`report` as JSON; a list whose items are lists or dictionaries has an item a line, anything else is one line."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_value(value)}" for key, value in report.items()) + "\n}\n"


def _value(value: Any) -> str:
    if not isinstance(value, list) or not any(isinstance(item, list | dict) for item in value):
        return json.dumps(value, ensure_ascii=False)
    return "[\n" + ",\n".join(f" {json.dumps(item, ensure_ascii=False)}" for item in value) + "\n]"


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report with one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(report), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write many rows, an answer each, as compressed JSON lines; the same rows make the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def read_lines(path: Path) -> list[Any]:
    """The rows of a `.jsonl.gz`."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
