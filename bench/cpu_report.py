"""Measure the CPU kernels beside torch's SDPA path, sgemm and a memory copy, all in one process; write it up.

    make cpu-report                                   # everything, to docs/evidence/cpu.{json,md}
    python -m bench.cpu_report --rounds 3 --only 512/8 # some of it, printed only

Every number is a ratio of medians over interleaved rounds; absolute times of a shared machine mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.cpu_page import page
from bench.limits import copy, matmul
from bench.shapes import HEADS, layout_of
from bench.timing import interleaved, ratio
from bench.work import visible_pairs
from gistkern import GistLayout, native
from gistkern.backends import cpu, sdpa
from gistkern.compaction import compact
from gistkern.testing import make_inputs

EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence"
# (layout, rows, heads)
TRAINING = [
    *[("512/8", 4096, heads) for heads in ("Llama-3-8B", "SmolLM2-135M")],
    ("512/8", 4096, "8 heads, D 64"),
    ("512/8", 4096, "8 heads, D 128"),
    *[
        (name, 4096, "SmolLM2-135M")
        for name in ("64/4", "256/16", "1024/128", "one segment", "hierarchical", "sliding")
    ],
]
GROWTH = [4096, 8192, 16384, 32768, 65536]
# cached gist rows, tail rows, batch
DECODING = [(10, 16, 1), (10, 16, 16), (256, 64, 1), (1024, 64, 16), (16384, 64, 1)]
SHAPES = HEADS | {"8 heads, D 64": (8, 8, 64), "8 heads, D 128": (8, 8, 128)}


def training_row(name: str, rows: int, heads: str, rounds: int) -> dict[str, Any]:
    """Forward, and forward with backward, of one layout: ours, SDPA's path, and the peak."""
    query_heads, kv_heads, dim = SHAPES[heads]
    layout = layout_of(name, rows)
    inputs = make_inputs(layout, heads=query_heads, kv_heads=kv_heads, head_dim=dim)
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))
    gist = compact(k, v, None, None, layout.gather)
    call = (q, k, v, *gist, layout.gist_begin, layout.gist_end, layout.local_begin, dim**-0.5)
    ours, theirs = cpu.forward(*call), sdpa.forward(*call)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # no number on a red check

    def backward(backend: Any, saved: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], Any]:
        return lambda: backend.backward(inputs.grad_out, *call[:5], *saved, *call[5:])

    for mine, other in zip(backward(cpu, ours)(), backward(sdpa, theirs)(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
    flops = 4 * dim * visible_pairs(layout) * query_heads
    products, done = matmul(flops, "cpu", q.dtype)
    gemms = flops / done
    calls = {
        "sgemm": products,
        "forward": lambda: cpu.forward(*call),
        "sdpa forward": lambda: sdpa.forward(*call),
        "backward": backward(cpu, ours),
        "sdpa backward": backward(sdpa, theirs),
    }
    seconds = interleaved(calls, rounds)
    for both, one in (("both", "backward"), ("sdpa both", "sdpa backward")):
        before = "forward" if both == "both" else "sdpa forward"
        seconds[both] = [a + b for a, b in zip(seconds[before], seconds[one], strict=True)]
    return {
        "layout": name,
        "rows": rows,
        "heads": heads,
        "forward of peak": ratio(seconds, "sgemm", "forward", gemms),
        "both of peak": ratio(seconds, "sgemm", "both", 3.5 * gemms),
        "sdpa forward of peak": ratio(seconds, "sgemm", "sdpa forward", gemms),
        "sdpa both of peak": ratio(seconds, "sgemm", "sdpa both", 3.5 * gemms),
        "forward, sdpa / ours": ratio(seconds, "sdpa forward", "forward"),
        "both, sdpa / ours": ratio(seconds, "sdpa both", "both"),
    }


def growth_rows(rounds: int) -> list[dict[str, Any]]:
    """Forward time per row at a fixed segment length, as a multiple of that of the shortest sequence."""
    calls, per_row = {}, {}
    for rows in GROWTH:
        layout = layout_of("512/8", rows)
        q, k, v = torch.randn(3, 1, 2, rows, 64)
        gist = compact(k, v, None, None, layout.gather)
        call = (q, k, v, *gist, layout.gist_begin, layout.gist_end, layout.local_begin, 0.125)
        calls[str(rows)] = lambda call=call: cpu.forward(*call)
        per_row[rows] = visible_pairs(layout) / rows
    seconds = interleaved(calls, rounds)
    first = str(GROWTH[0])
    return [
        {
            "rows": rows,
            "time per row": ratio(seconds, str(rows), first, GROWTH[0] / rows),
            "visible pairs per row": per_row[rows] / per_row[GROWTH[0]],
        }
        for rows in GROWTH
    ]


def decoding_row(gists: int, tail: int, batch: int, rounds: int) -> dict[str, Any]:
    """One decoding step of Llama-3-8B's heads: ours, SDPA's path, and copying as many bytes as the cache holds."""
    heads, kv_heads, dim = HEADS["Llama-3-8B"]
    layout = GistLayout.decode(gists, tail, batch_size=batch)
    inputs = make_inputs(layout, heads=heads, kv_heads=kv_heads, head_dim=dim)
    q, k, v, gist_k, gist_v = (
        t.detach() for t in (inputs.q, inputs.k, inputs.v, inputs.past_key, inputs.past_value) if t is not None
    )
    call = (q, k, v, gist_k, gist_v, layout.gist_begin, layout.gist_end, layout.local_begin, dim**-0.5)
    torch.testing.assert_close(cpu.forward(*call), sdpa.forward(*call), rtol=1e-4, atol=1e-5)
    cached = sum(t.nbytes for t in call[1:5])
    copied, moved = copy("cpu")
    calls = {
        "copy": copied,
        "ours": lambda: cpu.forward(*call),
        "sdpa": lambda: sdpa.forward(*call),
    }
    seconds = interleaved(calls, rounds)
    # a copy reads and writes; decoding only reads
    return {
        "gist rows": gists,
        "tail rows": tail,
        "batch": batch,
        "of copy bandwidth": ratio(seconds, "copy", "ours", cached / moved),
        "sdpa / ours": ratio(seconds, "sdpa", "ours"),
    }


def report(rounds: int, only: str | None = None) -> dict[str, Any]:
    """Everything measured, with what it was measured on."""
    training = [shape for shape in TRAINING if only in (None, shape[0])]
    rows = [training_row(*shape, rounds) for shape in tqdm(training, desc="training", disable=None)]
    whole = only is None
    return {
        "grade": "measured",
        "command": "make cpu-report",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "instruction_set": native.instruction_set(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "training": rows,
        "growth": growth_rows(rounds) if whole else [],
        "decoding": [decoding_row(*shape, 4 * rounds) for shape in DECODING] if whole else [],
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or "unknown processor"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="one layout of the training table; nothing is written then")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = report(arguments.rounds, arguments.only)
    text = page(found)
    print(text)
    if arguments.only is None:
        (EVIDENCE / "cpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (EVIDENCE / "cpu.md").write_text(text)


if __name__ == "__main__":
    main()
