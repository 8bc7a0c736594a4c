"""The sections of docs/results/cpu.json as rows: what each measures, and what is said where it cannot."""

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.counted.work import visible_pairs
from bench.measured.attention import attention_case
from bench.measured.case import OURS, Case, measured
from bench.measured.decoding import compaction_case, decoding_case, microseconds, queued_calls
from bench.measured.grid import Grid
from bench.measured.layouts import layout_case
from bench.measured.memory import peak_bytes
from bench.measured.models import compressing_case, model_decoding_case
from bench.measured.timing import Call, interleaved, ratio
from bench.shapes import layout_of

Rows = list[dict[str, Any]]
# what grows with the rows: a layout and, but for ours, a baseline
GROWTH = (
    ("512/8", OURS),
    ("hierarchical", OURS),
    ("512/8", "sdpa dense"),
    ("512/8", "sdpa per segment"),
    ("512/8", "flex permuted"),
    ("512/8", "causal"),
)


class Beside(NamedTuple):
    """A section of cases, each timed side by side: a row's keys, their values, and the case of one of them."""

    keys: tuple[str, ...]
    places: Callable[[Grid], Iterable[tuple]]
    make: Callable[..., Case]  # of a place's values, the device and the grid
    times: int = 1  # as many rounds as others have
    warmup: int = 1


def _passes(grid: Grid) -> list[tuple]:
    return [(*row, one) for *row, passes in grid.attention for one in passes]


def _batches(grid: Grid) -> list[tuple]:
    return [(name, context, batch) for name, context, batches in grid.models for batch in batches]


_OP = ("gist rows", "tail rows", "batch", "heads")
BESIDE = {
    "attention": Beside(
        ("layout", "rows", "heads", "pass"),
        _passes,
        lambda *values: attention_case(*values[:-1], values[-1].baselines),
        1,
        0,
    ),
    "compaction": Beside(
        ("layout", "rows", "heads"), lambda g: g.compaction, lambda *values: compaction_case(*values[:-1])
    ),
    "decoding": Beside(_OP, lambda g: g.decoding, lambda *values: decoding_case(*values[:-1]), 2, 0),
    "models": Beside(("model", "context", "batch"), _batches, lambda *values: model_decoding_case(*values[:-1])),
    "compressing": Beside(("model", "tokens"), lambda g: g.compressing, lambda *values: compressing_case(*values[:-1])),
    "layouts": Beside(("layout", "rows"), lambda g: g.layouts, lambda *values: layout_case(*values[:-1])),
}


def beside(name: str, grid: Grid, device: str, rounds: int) -> Rows:
    """The rows of a section of cases."""
    section, found = BESIDE[name], []
    for place in tqdm(list(section.places(grid)), desc=name, disable=None):
        case = section.make(*place, device, grid)
        row = dict(zip(section.keys, place, strict=True)) | case.facts
        found.append(row | measured(case, section.times * rounds, section.warmup))
        case.calls.clear()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def growth(grid: Grid, device: str, rounds: int) -> Rows:
    """Forward by rows, all in the same rounds, as multiples of ours at the fewest rows."""
    timed: dict[str, Call] = {}
    found = []
    for layout, name in GROWTH:
        for rows in grid.growth:
            key = f"{layout} {name} {rows}"
            row = {"layout": layout, "name": name, "rows": rows, "heads": grid.growth_heads}
            row["visible_pairs"] = visible_pairs(layout_of(layout, rows))
            found.append((key, row))
            if name != OURS and rows > grid.growth_baselines:
                row["not_measured"] = f"only up to {grid.growth_baselines:,} rows"
                continue
            case = attention_case(layout, rows, grid.growth_heads, "forward", device, [name] if name != OURS else [])
            if name in case.calls:
                timed[key] = case.calls[name]
            else:
                row["not_measured"] = case.not_measured[name]
    seconds = interleaved(timed, rounds, device, queued=True)
    first = found[0][0]
    return [
        row | {"rounds": len(seconds[first])} | ({"time": ratio(seconds, key, first)} if key in timed else {})
        for key, row in found
    ]


def queueing(grid: Grid, device: str, rounds: int) -> Rows:
    """The host's part of a call for a GPU."""
    if device == "cpu":
        return []
    return [
        {"call": what, "heads": grid.growth_heads} | {name: microseconds(call, rounds) for name, call in both.items()}
        for what, both in queued_calls(grid.growth_heads, device).items()
    ]


def memory(grid: Grid, device: str, rounds: int) -> Rows:
    """Peak memory, one process per number."""
    found = []
    for case, names in grid.memory:
        for name in tqdm(names, desc="memory", disable=None):
            peak = peak_bytes(case, name)
            known = {"peak bytes": peak} if isinstance(peak, int) else {"not_measured": peak}
            found.append({"case": list(case), "name": name, **known})
    return found


SECTIONS: dict[str, Callable[[Grid, str, int], Rows]] = {name: partial(beside, name) for name in BESIDE}
SECTIONS |= {"growth": growth, "queueing": queueing, "memory": memory}
