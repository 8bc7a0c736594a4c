"""The tables of docs/evidence/compare.md, of the report that examples/compare.py writes: a line per trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.markdown import measured_on, table


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """Exact answers by length, and what several keys at once leave of them."""
    by_length = [result for result in report["results"] if "rows" in result]
    by_keys = [result for result in report["results"] if "capacity" in result]
    lengths = [row["tokens"] for row in by_length[0]["rows"]]
    keys = [row["keys"] for row in by_keys[0]["capacity"]]
    exact = [
        [
            result["name"],
            f"{result['rows'][0]['gist_tokens']} to {result['rows'][-1]['gist_tokens']}",
            *(f"{100 * row['exact']:.0f}" for row in result["rows"]),
        ]
        for result in by_length
    ]
    capacity = [
        [
            result["name"],
            *(f"{100 * row['exact']:.0f}" for row in result["capacity"]),
            *(f"{row['digits_per_row']:.2f}" for row in result["capacity"]),
        ]
        for result in by_keys
    ]
    return {
        "measured on": measured_on({**report, **report["environments"][0]}),
        "exact": table(["configuration", "cached rows", *(f"{tokens:,}" for tokens in lengths)], exact),
        "capacity": table(
            ["configuration", *(f"{count} keys" for count in keys), *(f"digits per row, {count}" for count in keys)],
            capacity,
        ),
    }
