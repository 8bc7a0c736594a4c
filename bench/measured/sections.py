"""The sections of reports as rows: what each measures, and what is said where it cannot."""

import gc
import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.counted.work import visible_pairs
from bench.measured.attention import attention_case
from bench.measured.case import OURS, Case, measured
from bench.measured.decoding import microseconds, queued_calls
from bench.measured.grid import Grid
from bench.measured.memory import peak_bytes
from bench.measured.timing import Call, interleaved, ratio
from bench.shapes import layout_of

Rows = Iterable[dict[str, Any]]
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


def _of(module: str, name: str) -> Callable[..., Case]:
    """A case of a module that brings transformers, which most stages of a GPU's minutes do not wait for."""
    return lambda *values: getattr(importlib.import_module(f"bench.measured.{module}"), name)(*values[:-1])


_OP = ("gist rows", "tail rows", "batch", "heads")
_READ = ("model", "tokens", "segment", "tokens a call")
BESIDE = {
    "attention": Beside(
        ("layout", "rows", "heads", "pass"),
        _passes,
        lambda *values: attention_case(*values[:-1], values[-1].baselines),
        1,
        0,
    ),
    "compaction": Beside(("layout", "rows", "heads"), lambda g: g.compaction, _of("decoding", "compaction_case")),
    "decoding": Beside(_OP, lambda g: g.decoding, _of("decoding", "decoding_case"), 2, 0),
    "models": Beside(("model", "context", "batch"), _batches, _of("models", "model_decoding_case")),
    "generating": Beside(("model",), lambda g: g.generating, _of("step", "generating_case")),
    "compressing": Beside(_READ, lambda g: g.compressing, _of("models", "compressing_case")),
    "training": Beside(("model", "layout", "rows"), lambda g: g.training, _of("training", "training_case")),
    "layouts": Beside(("layout", "rows"), lambda g: g.layouts, _of("layouts", "layout_case")),
}


def beside(name: str, grid: Grid, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of a section of cases, each as soon as it is measured."""
    section = BESIDE[name]
    for place in tqdm(list(section.places(grid)), desc=name, disable=None):
        case = section.make(*place, device, grid)
        row = dict(zip(section.keys, place, strict=True)) | case.facts
        yield row | measured(case, section.times * rounds, section.warmup)
        case.calls.clear()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


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
    for heads in grid.queueing:
        for what, calls in queued_calls(heads, device).items():
            yield {"call": what, "heads": heads} | {
                name: microseconds(call, rounds, device) for name, call in calls.items()
            }


def memory(grid: Grid, device: str, rounds: int) -> Rows:
    """Peak memory, one process per number."""
    for case, names in grid.memory:
        for name in tqdm(names, desc="memory", disable=None):
            peak = peak_bytes(case, name)
            known = {"peak bytes": peak} if isinstance(peak, int) else {"not_measured": peak}
            yield {"case": list(case), "name": name, **known}


SECTIONS: dict[str, Callable[[Grid, str, int], Rows]] = {name: partial(beside, name) for name in BESIDE}
SECTIONS |= {"growth": growth, "queueing": queueing, "memory": memory}
