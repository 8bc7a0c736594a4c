"""The aims of the benchmarks, and whether a report meets them: missed ones are named on the page, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.measured.case import OURS
from bench.measured.models import FULL

__all__ = ["LINEAR", "Aim", "aims", "slope"]

ROWS, LAYOUT = 16384, "512/8"
DENSE_FORWARD, FLEX_FORWARD, DENSE_BOTH = 8.0, 4.0, 6.0
LINEAR = 1.1  # exponent of cost against rows
GROWTH_FROM, GROWTH_TO = 4096, 65536
SHORT, LONG = 64, 4096

# said where an aim is missed, beside what was measured
WHY_NOT_FASTER = {
    "flex permuted": "with its keys as [gists, raw] FlexAttention skips the blocks that we skip, so the speed of the "
    "kernels is all there is to win, {its:.2f} of peak against our {ours:.2f}"
}
WHY_NOT_FASTER_WHEN_SHORT = (
    "a step over gist rows makes a layout and plans its cache, which a DynamicCache does not, and so short a context "
    "leaves little to save; the ranges of the rounds are in the table"
)
WHY_NOT_LINEAR = (
    "every segment sees the gists of all before it, so the work that the mask asks for is not linear; the cost grows "
    "no faster than the work"
)


@dataclass(frozen=True)
class Aim:
    """What was wanted, what was found; `met` is None where it was not measured, `why` the reason if it was missed."""

    wanted: str
    found: str
    met: bool | None
    why: str = ""


def aims(report: Mapping[str, Any]) -> list[Aim]:
    """All aims, in the order of the page's sections."""
    return [
        _slower(report, "forward", ("sdpa dense",), DENSE_FORWARD, "SDPA with a dense mask"),
        _slower(report, "forward", ("flex", "flex permuted"), FLEX_FORWARD, "FlexAttention, either way,"),
        _slower(report, "both", ("sdpa dense",), DENSE_BOTH, "SDPA with a dense mask"),
        *(_linear(report, layout) for layout in ("512/8", "hierarchical")),
        _bytes(report),
        _decoding(report, SHORT, "no fewer", lambda ratio: ratio >= 1, WHY_NOT_FASTER_WHEN_SHORT),
        _decoding(report, LONG, "more", lambda ratio: ratio > 1),
    ]


def _slower(report: Mapping[str, Any], passes: str, names: tuple[str, ...], factor: float, title: str) -> Aim:
    wanted = f"{passes} at {ROWS:,} rows of {LAYOUT}: {title} takes at least {factor:g} times our time"
    for row in report.get("attention", []):
        if (row["layout"], row["rows"], row["pass"]) == (LAYOUT, ROWS, passes):
            ratios = {
                name: row["slower_than_ours"][name]["median"] for name in names if name in row["slower_than_ours"]
            }
            if len(ratios) == len(names):
                last = min(ratios, key=ratios.__getitem__)
                found = ", ".join(f"{name} {value:.1f} times" for name, value in ratios.items())
                shares = {name: row["of_limit"][name]["median"] for name in (OURS, last)}
                why = WHY_NOT_FASTER.get(last, "").format(its=shares[last], ours=shares[OURS])
                return Aim(wanted, found, ratios[last] >= factor, why)
    return Aim(wanted, "not measured", None)


def slope(points: Iterable[tuple[float, float]]) -> float:
    """Exponent of a power law through points ``(rows, cost)``: least squares of the logarithms."""
    logs = [(math.log(rows), math.log(cost)) for rows, cost in points]
    x, y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)


def _linear(report: Mapping[str, Any], layout: str) -> Aim:
    wanted = f"forward of {layout}, {GROWTH_FROM:,} to {GROWTH_TO:,} rows: cost grows with rows ** {LINEAR:g} or less"
    rows = [
        row
        for row in report.get("growth", [])
        if row["layout"] == layout and row["name"] == OURS and GROWTH_FROM <= row["rows"] <= GROWTH_TO
    ]
    if len(rows) < 2:
        return Aim(wanted, "not measured", None)
    time = slope((row["rows"], row["time"]["median"]) for row in rows)
    pairs = slope((row["rows"], row["visible_pairs"]) for row in rows)
    found = f"rows ** {time:.2f}; the pairs that the mask shows grow with rows ** {pairs:.2f}"
    return Aim(wanted, found, time <= LINEAR, WHY_NOT_LINEAR if pairs > LINEAR else "")


def _bytes(report: Mapping[str, Any]) -> Aim:
    wanted = "a GistCache holds the bytes of its gist rows and no more"
    rows = report.get("models", [])
    if not rows:
        return Aim(wanted, "not measured", None)
    # the full cache's bytes per token, times the gist rows
    met = all(row["gist bytes"] * row["context"] == row["full bytes"] * row["gist rows"] for row in rows)
    return Aim(wanted, f"{'equal' if met else 'not equal'} in all {len(rows)} measured cases", met)


def _decoding(report: Mapping[str, Any], context: int, what: str, test: Callable[[float], bool], why: str = "") -> Aim:
    wanted = (
        f"decoding after {context:,} tokens: {what} tokens per second than a DynamicCache gives, at every batch it fits"
    )
    rows = [row for row in report.get("models", []) if row["context"] == context]
    medians = [row["slower_than_ours"][FULL]["median"] for row in rows if FULL in row["slower_than_ours"]]
    if not medians:
        return Aim(wanted, "not measured", None)
    found = f"{min(medians):.2f} to {max(medians):.2f} times as many in {len(medians)} cases"
    if len(medians) < len(rows):
        found += f"; in {len(rows) - len(medians)} more the DynamicCache could not be measured"
    return Aim(wanted, found, all(map(test, medians)), why)
