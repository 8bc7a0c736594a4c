"""Tables of docs/results.md: medians of the rows that a reader compares first, and layouts compared."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.markdown import columns, measured_on, median, table
from bench.measured import decoding
from bench.measured.baselines import BASELINES
from bench.measured.case import FULL, OURS, PREFILL
from bench.measured.decoding import OPERATORS, SDPA

Rows = Sequence[Mapping[str, Any]]
BOTH_OF = "512/8"  # the layout whose backward is in the table


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """A table of every section that was measured, and a line about where."""
    found = {name: make(report[name]) for name, make in _SECTIONS.items() if report.get(name)}
    return {"measured on": measured_on(report), **found}


def _slower(name: str) -> Callable[[Any], str]:
    return lambda row: median(row["slower_than_ours"].get(name))


def _share(name: str) -> Callable[[Any], str]:
    return lambda row: median(row["of_limit"].get(name))


def _attention(rows: Rows) -> str:
    shown = [row for row in rows if row["pass"] == "forward" or (row["layout"], row["pass"]) == (BOTH_OF, "both")]
    names = [name for name in BASELINES if any(name in row["slower_than_ours"] for row in rows)]
    return columns(
        shown,
        {name: name for name in ("layout", "rows", "heads", "pass")}
        | {"of peak": _share(OURS)}
        | {name: _slower(name) for name in names},
        4,
    )


def _growth(rows: Rows) -> str:
    sizes = sorted({row["rows"] for row in rows})[::2]
    cells = {(row["layout"], row["name"], row["rows"]): row for row in rows}
    series = dict.fromkeys((row["layout"], row["name"]) for row in rows)
    lines = [
        [layout, name, *(median(cells[layout, name, size].get("time"), 1) for size in sizes)] for layout, name in series
    ]
    for layout in dict.fromkeys(layout for layout, _ in series):
        pairs = [cells[layout, OURS, size]["visible_pairs"] for size in sizes]
        lines.append([layout, "visible pairs", *(f"{one / pairs[0]:,.1f}" for one in pairs)])
    return table(["layout", "", *(f"{size:,}" for size in sizes)], lines, 2)


def _decoding(rows: Rows) -> str:
    names = [name for name in decoding.BASELINES if any(name in row["slower_than_ours"] for row in rows)]
    sizes = {name: name for name in ("gist rows", "tail rows", "batch")}
    return columns(rows, sizes | {"of copy": _share(OURS)} | {name: _slower(name) for name in names}, 0)


def _memory(rows: Rows) -> str:
    held = {(tuple(row["case"]), row["name"]): row.get("peak bytes") for row in rows}
    lines = []
    for (case, name), size in held.items():
        if size is not None:
            what = ", ".join(str(part) for part in case[1:-1])
            lines.append([what, name, f"{size:,}", f"{size / max(held[case, OURS] or 0, 1):.1f}"])
    return table(["call", "", "bytes", "of ours"], lines, 2)


def _plain(*keys: str, **cells: Callable[[Any], str]) -> Callable[[Rows], str]:
    """Columns of keys, and of what makes a cell of a row."""
    return lambda rows: columns(rows, {key: key for key in keys} | cells)


def _queueing(rows: Rows) -> str:
    names = {"gistkern": OURS, OPERATORS: OPERATORS, "SDPA": SDPA}
    told = {title: name for title, name in names.items() if any(name in row for row in rows)}
    return columns(
        rows,
        {"call": "call"} | {title: lambda row, name=name: median(row.get(name), 0) for title, name in told.items()},
    )


def _speeds(*keys: str) -> Callable[[Rows], str]:
    """Tokens per second of every way, and what the others take of our time."""

    def make(rows: Rows) -> str:
        names = dict.fromkeys(name for row in rows for name in row["tokens per second"])

        def cell(row: Any, name: str) -> str:
            speed = row["tokens per second"].get(name)
            slower = "" if name == OURS or speed is None else f" ({median(row['slower_than_ours'][name])})"
            return "-" if speed is None else f"{speed:,.0f}{slower}"

        cells = {name: lambda row, name=name: cell(row, name) for name in names}
        return columns(rows, {key: key for key in keys} | cells, len(keys))

    return make


_TILES = ("kernel", "width", "block_rows", "block_cols", "num_warps", "num_stages", "of the shipped")
_SECTIONS: dict[str, Callable[[Rows], str]] = {
    "attention": _attention,
    "growth": _growth,
    "compaction": _plain("layout", "rows", **{"of copy": _share(OURS), "indexing": _slower("indexing")}),
    "decoding": _decoding,
    "queueing": _queueing,
    "generating": _speeds("model"),
    "training": _speeds("model", "layout", "rows"),
    "tiles": _plain(*_TILES),
    "models": _plain("model", "context", "batch", "gist bytes", "full bytes", **{"tokens per second": _slower(FULL)}),
    "compressing": _plain(
        *("model", "tokens", "segment", "tokens a call"),
        **{name: _slower(name) for name in ("compress, one segment", PREFILL)},
    ),
    "layouts": _plain("layout", "rows", **{name: _slower(name) for name in ("dense mask", "block mask")}),
    "memory": _memory,
}


def compared(report: Mapping[str, Any]) -> dict[str, str]:
    """Exact answers by length, and what several keys at once leave of them."""
    by_length = [result for result in report["results"] if "rows" in result]
    by_keys = [result for result in report["results"] if "capacity" in result]
    lengths = [row["tokens"] for row in by_length[0]["rows"]]
    keys = [row["keys"] for row in by_keys[0]["capacity"]]

    def percent(rows: Rows) -> list[str]:
        return [f"{100 * row['exact']:.0f}" for row in rows]

    exact = [
        [one["name"], f"{one['rows'][0]['gist_tokens']} to {one['rows'][-1]['gist_tokens']}", *percent(one["rows"])]
        for one in by_length
    ]
    capacity = [
        [one["name"], *percent(one["capacity"]), *(f"{row['digits_per_row']:.2f}" for row in one["capacity"])]
        for one in by_keys
    ]
    return {
        "measured on": measured_on({**report, **report["environments"][0]}),
        "exact": table(["configuration", "cached rows", *(f"{tokens:,}" for tokens in lengths)], exact),
        "capacity": table(
            ["configuration", *(f"{count} keys" for count in keys), *(f"digits per row, {count}" for count in keys)],
            capacity,
        ),
    }
