"""Put tables into pages that are written by hand.

A page marks the place of a table by name, and what stands there is replaced:

    <!-- table: attention -->
    <!-- end -->
"""

import re
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results"  # reports; their tables are on the page beside the folder
_PLACE = re.compile(r"<!-- table: ([^>]+) -->\n.*?<!-- end -->", re.DOTALL)


def places(text: str) -> list[str]:
    """The names of the tables that a page has a place for."""
    return _PLACE.findall(text)


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A page with its tables: those without a place come last, under headings of their own; other places stay."""
    for name in [name for name in tables if name not in places(text)]:
        text += f"\n## {name}\n\n<!-- table: {name} -->\n<!-- end -->\n"
    return _PLACE.sub(
        lambda found: (
            f"<!-- table: {found[1]} -->\n{tables[found[1]]}\n<!-- end -->" if found[1] in tables else found[0]
        ),
        text,
    )


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Fill a page; where there is none yet, one with nothing but the tables."""
    text = page.read_text("utf-8") if page.exists() else f"# {page.stem}\n"
    page.write_text(filled(text, tables), encoding="utf-8")


def named(report: Path, tables: Mapping[str, str]) -> dict[str, str]:
    """Tables by the names of their places on the page of all results, where each report has its own."""
    return {f"{name}, {report.stem}": linked(table, f"{name}-{report.stem}") for name, table in tables.items()}


def linked(table: str, name: str) -> str:
    """A table whose rows can be linked: by its name and a row's first cells, as many as tell the rows apart."""
    head, *others = table.splitlines()
    if len(others) < 2 or not others[0].startswith("| ---"):
        return table
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in others[1:]]
    count = max(1, others[0].split(" | ---:")[0].count("---"))
    while len({tuple(row[:count]) for row in rows}) < len(rows):
        count += 1
    anchors = [re.sub("[^a-z0-9]+", "-", " ".join([name, *row[:count]]).lower()).strip("-") for row in rows]
    lines = [f'<a id="{anchor}"></a>'.join(["| ", line[2:]]) for anchor, line in zip(anchors, others[1:], strict=True)]
    return "\n".join([head, others[0], *lines])


def fill_results(report: Path, tables: Mapping[str, str]) -> None:
    """Fill the page beside a report's folder."""
    fill(report.parent.with_suffix(".md"), named(report, tables))
