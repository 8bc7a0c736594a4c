"""Put tables into pages that are written by hand.

    python -m bench.fill            # again, from the committed reports: the pages that no other command fills

A page marks the place of a table by name, and what stands there is replaced:

    <!-- table: attention -->
    <!-- end -->
"""

import json
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


def main() -> None:
    """Fill the pages of the committed reports."""
    from bench.compiled import aot
    from bench.measured import context_parallel
    from bench.measured import tables as measured

    evidence = DOCS / "evidence"
    pages = dict.fromkeys(sorted(DOCS.glob("benchmarks*.json")), measured.tables)
    pages[evidence / "kernels.json"] = aot.tables
    pages[evidence / "context-parallel.json"] = context_parallel.tables
    pages[evidence / "compare.json"] = measured.compared
    for path, tables in pages.items():
        fill(path.with_suffix(".md"), tables(json.loads(path.read_text("utf-8"))))


if __name__ == "__main__":
    main()
