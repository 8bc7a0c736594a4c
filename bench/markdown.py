"""Cells and tables of the pages."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import floor, log10
from typing import Any


def significant(value: float, digits: int = 3) -> str:
    """Plain decimal notation with at least so many significant digits and all digits before the point."""
    if not value:
        return "0"
    places = digits - 1 - floor(log10(abs(value)))
    return f"{value:,.{max(places, 0)}f}"


def median(value: Mapping[str, float] | None, digits: int = 2) -> str:
    """The median of a ratio or a time; a dash where nothing was measured."""
    return "-" if value is None else f"{value['median']:,.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int = 1) -> str:
    """A Markdown table; the columns after the first few are right-aligned."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in (head, rule, *rows))


def columns(
    rows: Iterable[Mapping[str, Any]], cells: Mapping[str, str | Callable[[Any], Any]], text_columns: int = 1
) -> str:
    """A table of rows: by column, the key of its cells (whole numbers with commas) or what makes one of a row."""

    def cell(row: Mapping[str, Any], make: str | Callable[[Any], Any]) -> Any:
        value = row[make] if isinstance(make, str) else make(row)
        return f"{value:,}" if isinstance(value, int) else value

    return table(list(cells), ([cell(row, make) for make in cells.values()] for row in rows), text_columns)


def measured_on(report: Mapping[str, Any]) -> str:
    """One line: the grade, the command, the machine and the versions of a report."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    machine = "; ".join(str(report[key]) for key in ("device", "machine") if report.get(key))
    on = f" on {machine}" if machine else ""
    return f"Grade **{report['grade']}**: `{report['command']}`{on}; {versions}."
