"""``python -m bench.pages``: the tables of committed reports and of model families, on their pages again."""

import json
from pathlib import Path

from bench import families, passkeys
from bench.fill import DOCS, RESULTS, fill, named
from bench.measured import context_parallel
from bench.measured import tables as measured

MEASURED = {
    RESULTS / "cpu.json": measured.tables,
    **dict.fromkeys(sorted(RESULTS.glob("nvidia-*.json")), measured.tables),
    RESULTS / "context-parallel.json": context_parallel.tables,
    RESULTS / "compare.json": measured.compared,
}


def read(path: Path) -> dict:
    """A committed report."""
    return json.loads(path.read_text("utf-8"))


def results() -> dict[str, str]:
    """The tables of docs/results.md, by the names of their places."""
    found = passkeys.tables()
    for path, tables in MEASURED.items():
        found |= named(path, tables(read(path)))
    return found


def main() -> None:
    """Fill the pages."""
    fill(RESULTS.with_suffix(".md"), results())
    from bench.compiled import aot  # needs Triton and cuxray

    fill(DOCS / "internals" / "compiled.md", aot.tables(read(DOCS / "internals" / "compiled.json")))
    fill(DOCS / "reference" / "families.md", families.tables())


if __name__ == "__main__":
    main()
