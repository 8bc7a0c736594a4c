"""The sections of docs/benchmarks.md as rows: what each measures, and what is said where it cannot."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from bench.counted.work import visible_pairs
from bench.measured.attention import attention_case
from bench.measured.case import OURS, Case, measured
from bench.measured.compaction import compaction_case
from bench.measured.decoding import decoding_case
from bench.measured.grid import Grid
from bench.measured.layouts import layout_case
from bench.measured.memory import peak_bytes
from bench.measured.models import FULL, compressing_case, model_decoding_case
from bench.measured.queueing import calls, microseconds
from bench.measured.timing import Call, interleaved, ratio
from bench.shapes import layout_of

__all__ = ["GROWTH", "SECTIONS", "attention"]

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


def attention(grid: Grid, device: str, rounds: int) -> Rows:
    """Forward, backward and both, of every layout."""
    found = []
    cases = [(*row, one) for *row, passes in grid.attention for one in passes]
    for layout, rows, heads, passes in tqdm(cases, desc="attention", disable=None):
        case = attention_case(layout, rows, heads, passes, device, grid.baselines)
        found.append({"layout": layout, "rows": rows, "heads": heads, "pass": passes, **measured(case, rounds, 0)})
        _free(case)
    return found


def growth(grid: Grid, device: str, rounds: int) -> Rows:
    """Forward by rows, all in the same rounds, as multiples of ours at the fewest rows."""
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for layout, name in GROWTH:
        for rows in grid.growth:
            key = f"{layout} {name} {rows}"
            if name != OURS and rows > grid.growth_baselines:
                reasons[key] = f"only up to {grid.growth_baselines:,} rows"
                continue
            case = attention_case(layout, rows, grid.growth_heads, "forward", device, [name] if name != OURS else [])
            if name in case.calls:
                calls[key] = case.calls[name]
            else:
                reasons[key] = case.not_measured[name]
    seconds = interleaved(calls, rounds, device, queued=True)
    first = f"512/8 {OURS} {grid.growth[0]}"
    return [
        {
            "layout": layout,
            "name": name,
            "rows": rows,
            "heads": grid.growth_heads,
            "visible_pairs": visible_pairs(layout_of(layout, rows)),
            "rounds": len(seconds[first]),
            **({"time": ratio(seconds, key, first)} if key in calls else {"not_measured": reasons[key]}),
        }
        for layout, name in GROWTH
        for rows in grid.growth
        for key in [f"{layout} {name} {rows}"]
    ]


def compaction(grid: Grid, device: str, rounds: int) -> Rows:
    """Gathering the gist rows of one layer."""
    return [
        {"layout": layout, "rows": rows, "heads": heads}
        | measured(compaction_case(layout, rows, heads, device), rounds)
        for layout, rows, heads in tqdm(grid.compaction, desc="compaction", disable=None)
    ]


def decoding(grid: Grid, device: str, rounds: int) -> Rows:
    """One step of the op over cached rows."""
    return [
        {"gist rows": gists, "tail rows": tail, "batch": batch, "heads": heads}
        | measured(decoding_case(gists, tail, batch, heads, device), 2 * rounds, 0)
        for gists, tail, batch, heads in tqdm(grid.decoding, desc="decoding", disable=None)
    ]


def queueing(grid: Grid, device: str, rounds: int) -> Rows:
    """The host's part of a call for a GPU."""
    if device == "cpu":
        return []
    return [
        {"call": what, "heads": grid.growth_heads} | {name: microseconds(call, rounds) for name, call in both.items()}
        for what, both in calls(grid.growth_heads, device).items()
    ]


def models(grid: Grid, device: str, rounds: int) -> Rows:
    """One step of a model over a GistCache and over a DynamicCache."""
    found = []
    for name, context, batches in grid.models:
        for batch in tqdm(batches, desc=f"{name}, {context} tokens", disable=None):
            case, held = model_decoding_case(name, context, batch, device)
            row = {"model": name, "context": context, "batch": batch, "gist rows": held["rows"]}
            found.append(row | {"gist bytes": held[OURS], "full bytes": held[FULL], **measured(case, rounds)})
            _free(case)
    return found


def compressing(grid: Grid, device: str, rounds: int) -> Rows:
    """Reading a context."""
    found = []
    for name, tokens in tqdm(grid.compressing, desc="compressing", disable=None):
        case = compressing_case(name, tokens, device)
        found.append({"model": name, "tokens": tokens} | measured(case, rounds))
        _free(case)
    return found


def layouts(grid: Grid, device: str, rounds: int) -> Rows:
    """Making a layout."""
    return [
        {"layout": name, "rows": rows} | measured(layout_case(name, rows, device), rounds)
        for name, rows in tqdm(grid.layouts, desc="layouts", disable=None)
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


def _free(case: Case) -> None:
    case.calls.clear()
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[Grid, str, int], Rows]] = {
    "attention": attention,
    "growth": growth,
    "compaction": compaction,
    "decoding": decoding,
    "queueing": queueing,
    "models": models,
    "compressing": compressing,
    "layouts": layouts,
    "memory": memory,
}
