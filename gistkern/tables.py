"""Tables of numbers: for a terminal of at most 100 columns, and as Markdown for files."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

__all__ = ["WIDEST", "as_markdown", "as_text", "nbytes_said"]

WIDEST = 100


class _Sheet(io.StringIO):
    """Takes what standard output can show."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Where it is none of Unicode's, rules are drawn in ASCII."""
        return getattr(sys.stdout, "encoding", None) or "utf-8"


def as_text(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    wraps: Sequence[int] = (0,),
    title: str = "",
) -> str:
    """A table as wide as the terminal at most where its numbers have room there, and never wider than 100 columns.

    Parameters
    ----------
    head : sequence of str
        Names of the columns.
    rows : sequence of sequences of str
        Cells.
    left : sequence of int
        Columns whose cells begin at the left; numbers end at the right.
    wraps : sequence of int
        Columns that take several lines where there is no room; the others do so only where that is not enough.
    title : str, optional
        A line above.

    Examples
    --------
    >>> from gistkern.tables import as_text
    >>> print(as_text(["", "rows", "bytes"], [["gist", "11", "5.6 kB"], ["full cache", "6,096", "3.1 MB"]]))
                 rows   bytes
    ─────────────────────────
    gist           11  5.6 kB
    full cache  6,096  3.1 MB
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), title=title or None)
    table.title_justify, table.title_style = "left", "none"
    for number, name in enumerate(head):
        justify = "left" if number in left else "right"
        table.add_column(Text(name), justify=justify, no_wrap=number not in wraps, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    sheet = _Sheet()
    console = Console(file=sheet, width=10 * WIDEST, color_system=None, force_terminal=False, legacy_windows=False)
    least = 2 * (len(head) - 1)
    for number, cells in enumerate(zip(head, *rows, strict=True)):
        pieces = [word for cell in cells for word in cell.split()] if number in wraps else cells
        least += max(map(cell_len, pieces), default=0)
    if least > WIDEST:
        for column in table.columns:
            column.no_wrap = False
    terminal = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    console.print(table, width=terminal if least <= terminal else WIDEST)
    return "\n".join(line.rstrip() for line in sheet.getvalue().rstrip("\n").splitlines())


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """The same table for a Markdown file.

    Examples
    --------
    >>> from gistkern.tables import as_markdown
    >>> print(as_markdown(["", "rows"], [["gist", "11"]]))
    |  | rows |
    | --- | ---: |
    | gist | 11 |
    """
    rule = ["---" if number in left else "---:" for number in range(len(head))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, rule, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def nbytes_said(count: float) -> str:
    """Bytes in the unit that suits them.

    Examples
    --------
    >>> from gistkern.tables import nbytes_said
    >>> [nbytes_said(one) for one in (999, 5_632, 3_121_152, 2e12)]
    ['999 B', '5.6 kB', '3.1 MB', '2,000.0 GB']
    """
    if count < 1000:
        return f"{count:,.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.95:
            return f"{count:,.1f} {unit}"
    return f"{count / 1000:,.1f} GB"
