"""``python -m bench.pages``: the tables of committed reports and of model families, on pages no other command fills."""

import json

from bench import families
from bench.compiled import aot
from bench.fill import DOCS, fill
from bench.measured import context_parallel
from bench.measured import tables as measured


def main() -> None:
    """Fill the pages."""
    results = DOCS / "results"
    pages = dict.fromkeys(sorted(results.glob("*pu*.json")), measured.tables)
    pages[DOCS / "internals" / "compiled.json"] = aot.tables
    pages[results / "context-parallel.json"] = context_parallel.tables
    pages[results / "compare.json"] = measured.compared
    for path, tables in pages.items():
        fill(path.with_suffix(".md"), tables(json.loads(path.read_text("utf-8"))))
    fill(DOCS.parent / "README.md", families.tables())


if __name__ == "__main__":
    main()
