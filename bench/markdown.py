"""Cells and tables of the generated pages."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from math import floor, log10
from typing import Any

__all__ = ["bullets", "left_aligned", "per_card", "significant", "table"]


def significant(value: float, digits: int = 3) -> str:
    """Plain decimal notation with at least so many significant digits and all digits before the point."""
    if not value:
        return "0"
    places = digits - 1 - floor(log10(abs(value)))
    return f"{value:,.{max(places, 0)}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int = 1) -> str:
    """A Markdown table; the columns after the first few are right-aligned."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in (head, rule, *rows))


def left_aligned(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table without a right-aligned column."""
    return table(head, rows, len(head))


def bullets(lines: Iterable[str]) -> str:
    """A list, wrapped as the hand-written pages are."""
    return "\n".join(
        textwrap.fill(line, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False) for line in lines
    )


def per_card(names: Iterable[str], level: str, body: Callable[[str], str], suffix: str = "") -> list[str]:
    """A section per card."""
    return [f"{level} {name}{suffix}\n\n{body(name)}" for name in names]
