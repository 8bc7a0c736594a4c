"""Reports as JSON with one row a line: what changed is one line of a diff, and a file is as long as it has rows.

A report is a dictionary: a header of short values, and tables, which are lists of rows. `dumps` writes each of its keys
on a line of its own, and a table's rows on a line each. Any JSON reader reads it.
"""

import json
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
