"""What a call costs on the host, on the stub device: `make host`.

Counts (Python calls, C calls, launches, operations on tensors) are exact and the same at every run: COUNTS holds them,
and a test compares. Microseconds of this process's own time are told beside them, and those of torch's own attention
on one row, which is all host; the stub leaves out the driver's work and the CUDA allocator.
"""

import argparse
import collections
import ctypes
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.measured import stub

if not stub.active():
    stub.activate()

import torch

from bench.measured.calls import Calls, count
from gistkern import GistLayout, gist_attention
from gistkern.testing import make_inputs

# Llama-3-8B's heads
SIZES: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
CALLS, ROUNDS = 100, 11


class Row(NamedTuple):
    """One call's counts."""

    python: int
    c: int
    launches: int
    operations: int
    adds: int
    zeros: int


# of calls with a plan, with the versions of constraints.txt
COUNTS = {
    "forward": Row(python=11, c=8, launches=2, operations=0, adds=0, zeros=0),
    "forward, backward": Row(python=48, c=50, launches=6, operations=0, adds=0, zeros=0),
    "decode": Row(python=11, c=8, launches=1, operations=0, adds=0, zeros=0),
}


def cases() -> dict[str, Callable[[], Any]]:
    """Calls of the op as a layer makes them: of one segment with its gists and a tail, and one row over a cache."""
    layout = GistLayout.from_segments([100], 8, tail=20)
    inputs = make_inputs(layout, **SIZES)
    leaves = inputs.q, inputs.k, inputs.v
    plain = tuple(leaf.detach() for leaf in leaves)
    step = GistLayout.decode(10, 16)
    q, k, v, past_key, past_value = (leaf.detach() for leaf in make_inputs(step, **SIZES).leaves().values())

    def both() -> Any:
        return torch.autograd.grad(gist_attention(*leaves, layout, backend="triton"), leaves, inputs.grad_out)

    return {
        "forward": lambda: gist_attention(*plain, layout, backend="triton"),
        "forward, backward": both,
        "decode": lambda: gist_attention(q, k, v, step, past_key=past_key, past_value=past_value, backend="triton"),
    }


def torch_cases() -> dict[str, Callable[[], Any]]:
    """Torch's own attention on so little that the host's part is all."""
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v, grad = torch.randn(4, 1, 1, 1, 128, dtype=torch.bfloat16).unbind()
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    return {
        "forward": lambda: attention(q, k, v, is_causal=True),
        "forward, backward": lambda: torch.autograd.grad(attention(*leaves, is_causal=True), leaves, grad),
        "decode": lambda: attention(q, k, v),
    }


def counted(function: Callable[[], Any]) -> Row:
    """The counts of one call, after one that plans."""
    function(), function()
    before = stub.launches()
    calls: Calls = count(function)
    launches = stub.launches() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = collections.Counter(event.name for event in profile.events() if event.name.startswith("aten::"))
    zeros = sum(names[f"aten::{name}"] for name in ("zeros", "zeros_like", "zero_", "fill_"))
    adds = sum(names[f"aten::{name}"] for name in ("add", "add_"))
    return Row(*calls, launches, names.total(), adds, zeros)


def microseconds(function: Callable[[], Any]) -> float:
    """Of this thread's own time a call, the least of several rounds."""
    function(), function()
    rounds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            function()
        rounds.append((time.thread_time() - start) / CALLS * 1e6)
    return min(rounds)


def _cache_memory() -> None:
    """Let large tensors come from memory that the process holds, as CUDA's allocator has it, not from the system."""
    mallopt = ctypes.CDLL(None).mallopt
    for option in (-1, -3):  # when memory is given back, and from what size on it is asked for by itself
        mallopt(option, 1 << 30)


def main() -> None:
    """Counts, and unless --counts times."""
    parser = argparse.ArgumentParser(prog="python -m bench.measured.host", description=__doc__)
    parser.add_argument("--counts", action="store_true", help="counts alone, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    _cache_memory()
    found = {name: counted(function) for name, function in cases().items()}
    if given.counts:
        print(json.dumps({name: row._asdict() for name, row in found.items()}))
        return
    beside = torch_cases()
    print(f"{'call':20}{'Python':>8}{'C':>6}{'launches':>10}{'tensor ops':>12}{'us':>8}{'torch us':>10}{'ratio':>7}")
    for name, function in cases().items():
        ours, theirs = microseconds(function), microseconds(beside[name])
        row = found[name]
        print(
            f"{name:20}{row.python:>8}{row.c:>6}{row.launches:>10}{row.operations:>12}"
            f"{ours:>8.1f}{theirs:>10.1f}{ours / theirs:>7.2f}"
        )


if __name__ == "__main__":
    main()
