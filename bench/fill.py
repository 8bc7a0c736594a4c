"""Put tables into pages that are written by hand.

A page marks the place of a table by name, and what stands there is replaced:

    <!-- table: attention -->
    <!-- end -->
"""

import re
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
_PLACE = re.compile(r"<!-- table: ([^>]+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A page with its tables; ValueError unless it has a place for each of them, and no other place."""
    places = _PLACE.findall(text)
    if sorted(places) != sorted(tables):
        raise ValueError(f"the page has places for {', '.join(places) or 'none'}, the tables are {', '.join(tables)}")
    return _PLACE.sub(lambda found: f"<!-- table: {found[1]} -->\n{tables[found[1]]}\n<!-- end -->", text)


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Fill a page; where there is none yet, one with nothing but the tables."""
    bare = "\n\n".join(f"## {name}\n\n<!-- table: {name} -->\n<!-- end -->" for name in tables)
    text = page.read_text("utf-8") if page.exists() else f"# {page.stem}\n\n{bare}\n"
    page.write_text(filled(text, tables), encoding="utf-8")
