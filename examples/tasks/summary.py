"""The table of all answers in a folder: a row for each task, method and ratio, with Wilson intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from passkey.metrics import wilson
from tasks.record import read_record

__all__ = ["METHODS", "markdown", "read_folder", "rows_of", "show"]

METHODS = ("full", "none", "truncated", "bm25", "gists", "kvzip", "adakv", "snapkv", "compactor", "expected_attention")
SAME = ("model", "dtype", "seed", "squad")  # of all methods' runs, so that a table compares what can be compared
HEAD = (
    "task",
    "tokens",
    "method",
    "tokens per row",
    "rows",
    "kB",
    "CPU s",
    "n",
    "score",
    "%",
    "95 % interval",
    "also %",
)


def read_folder(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was run in a folder, and all answers in it. ValueError if the runs cannot be compared."""
    runs, lines = [], list[dict[str, Any]]()
    for path in sorted(folder.glob("answers-*.jsonl.gz")):
        run, found, _ = read_record(path)
        runs.append(run)
        lines += found
        if other := [name for name in SAME if run[name] != runs[0][name]]:
            raise ValueError(f"{path} is of another {' and '.join(other)} than what stands beside it")
    return runs, lines


def rows_of(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each task, length, method and ratio; tasks in the order in which they appear, methods in `METHODS`.

    The first score counts. Where it is a share and no yes or no (F1, say), Wilson's interval is that of as many yeses:
    wider than needed, since no share between 0 and 1 varies more than a yes or no of the same mean.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in ("task", "length", "method", "ratio")), []).append(line)
    tasks = list(dict.fromkeys(key[:2] for key in groups))
    order = sorted(groups, key=lambda key: (tasks.index(key[:2]), METHODS.index(key[2]), key[3]))
    return [_row(key, groups[key]) for key in order]


def _row(key: tuple[Any, ...], group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(group)

    scores = {name: mean(line["scores"][name] for line in group) for name in group[0]["scores"]}
    first = next(iter(scores))
    low, high = wilson(scores[first] * len(group), len(group))
    tokens, rows = (mean(line[name] for line in group) for name in ("tokens", "rows"))
    return {
        **dict(zip(("task", "length", "method", "ratio"), key, strict=True)),
        "n": len(group),
        "tokens": round(tokens, 1),
        "rows": round(rows, 1),
        "tokens_per_row": round(tokens / rows, 2) if rows else None,
        "bytes": round(mean(line["bytes"] for line in group)),
        "cpu_seconds": round(mean(line["seconds"] for line in group), 3),
        "score": first,
        "value": round(scores[first], 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "also": {name: round(value, 6) for name, value in scores.items() if name != first},
    }


def _cells(row: dict[str, Any]) -> list[str]:
    ratio = f"{row['tokens_per_row']:.1f}" if row["tokens_per_row"] else "-"
    return [
        row["task"],
        f"{row['tokens']:,.0f}",
        row["method"],
        ratio,
        f"{row['rows']:,.0f}",
        f"{row['bytes'] / 1000:,.0f}",
        f"{row['cpu_seconds']:.2f}",
        f"{row['n']}",
        row["score"].replace("_", " "),
        f"{100 * row['value']:.1f}",
        f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
        ", ".join(f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in row["also"].items()),
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(*HEAD, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=150).print(table)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a page."""
    lines = [HEAD, ["---"] + ["---:" if name not in ("method", "score", "also %") else "---" for name in HEAD[1:]]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [*lines, *map(_cells, rows)])
