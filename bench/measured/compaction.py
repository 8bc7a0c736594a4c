"""Filling the compact rows: what a prefill does once per layer beside attention."""

import torch

from bench.measured.case import OURS, Case
from bench.measured.limits import copy
from bench.measured.timing import captured
from bench.shapes import HEADS, layout_of
from gistkern import backends
from gistkern.ops import library

BASELINES = ("indexing",)
LIMIT = "copy"


def compaction_case(layout_name: str, rows: int, heads: str, device: str = "cpu") -> Case:
    """Gist rows of keys and values gathered by the op, and by plain indexing."""
    _, kv_heads, dim = HEADS[heads]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layout = layout_of(layout_name, rows).to(device)
    k, v = (torch.randn(1, kv_heads, rows, dim, device=device).to(dtype) for _ in range(2))
    gather, index = layout.gather, layout.gather[0]
    backend = backends.choose("auto", k, False)
    calls = {
        OURS: captured(lambda: library.compact(k, v, None, None, gather, backend), device),
        "indexing": captured(lambda: (k[:, :, index], v[:, :, index]), device),
    }
    for one, other in zip(calls[OURS](), calls["indexing"](), strict=True):
        assert torch.equal(one, other), "compaction gathers other rows than indexing"
    calls[LIMIT], limit_work = copy(device)
    moved = 2.0 * 2 * kv_heads * layout.num_compact * dim * k.itemsize
    return Case(device, calls, {}, LIMIT, moved, limit_work, repeat=20, queued=True)
