"""What the host takes to queue a call for a GPU: hidden where the device works longer, all there is otherwise."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.measured.case import OURS
from bench.shapes import HEADS
from gistkern import GistLayout, gist_attention
from gistkern.testing import make_inputs

SDPA = "sdpa"
CALLS = 50  # queued in a row for one time


def calls(heads: str, device: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """Ours and SDPA by what is called, at sizes where the device is done first; SDPA sees all rows, causally."""
    query_heads, kv_heads, dim = HEADS[heads]
    sizes = {"heads": query_heads, "kv_heads": kv_heads, "head_dim": dim, "dtype": torch.bfloat16}
    layout = GistLayout.from_segments([100], 8, tail=20, device=device)
    inputs = make_inputs(layout, **sizes)
    leaves = inputs.q, inputs.k, inputs.v
    plain = tuple(t.detach() for t in leaves)
    decode = GistLayout.decode(10, 16, device=device)
    step = make_inputs(decode, **sizes)
    q, k, v, past_key, past_value = (t.detach() for t in step.leaves().values())
    keys, values = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)

    def ours(*tensors: torch.Tensor) -> Any:
        return gist_attention(*tensors, layout)

    def sdpa(*tensors: torch.Tensor) -> Any:
        return F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)

    def both(attend: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, inputs.grad_out)

    return {
        "forward": {OURS: lambda: ours(*plain), SDPA: lambda: sdpa(*plain)},
        "both": {OURS: both(ours), SDPA: both(sdpa)},
        "decoding": {
            OURS: lambda: gist_attention(q, k, v, decode, past_key=past_key, past_value=past_value),
            SDPA: lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True),
        },
    }


def microseconds(call: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Of the host for one call: median, smallest and largest of the rounds; the first round does not count."""
    found = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return {"median": statistics.median(found[1:]), "min": min(found[1:]), "max": max(found[1:])}
