"""Single ops: decoding and compaction beside what else does them, and what the host takes to queue a call for a GPU."""

import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F

from bench.measured.case import OURS, Case, serve
from bench.measured.timing import captured, copy
from bench.shapes import HEADS, layout_of
from gistkern import GistLayout, backends, gist_attention
from gistkern.ops import attention, library
from gistkern.testing import make_inputs

LIMIT, SDPA, OPERATORS = "copy", "sdpa", "by operators"
CALLS = 50  # queued in a row for one time
BASELINES = {"sdpa": "SDPA over one buffer of all rows", "sdpa cuDNN": "SDPA, cuDNN"}
COMPACTION = ("indexing",)
Decode = Callable[[], torch.Tensor]


def decoding_case(
    gists: int, tail: int, batch: int, heads: str, device: str = "cpu", only: Collection[str] | None = None
) -> Case:
    """One query row per sample over `gists` compact and `tail` local rows.

    The baselines get all rows in one buffer, as a cache without gists would hold them: they copy nothing.
    """
    query_heads, kv_heads, dim = HEADS[heads]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)  # drawn where they stay: half a gigabyte

    def draw(count: int, rows: int) -> torch.Tensor:
        return torch.randn(batch, count, rows, dim, generator=generator, device=device, dtype=dtype)

    layout = GistLayout.decode(gists, tail, batch_size=batch).to(device)
    q, gist_k, gist_v = draw(query_heads, 1), draw(kv_heads, gists), draw(kv_heads, gists)
    k, v = draw(kv_heads, tail + 1), draw(kv_heads, tail + 1)
    keys, values = torch.cat([gist_k, k], 2), torch.cat([gist_v, v], 2)

    def ours() -> torch.Tensor:
        return gist_attention(q, k, v, layout, past_key=gist_k, past_value=gist_v)

    # a copy reads and writes, decoding reads; repeated, as a model's layers are queued one after another
    work, repeat = keys.nbytes + values.nbytes, 20 if batch < 64 else 4
    case = Case(device, {OURS: captured(ours, device)}, limit=LIMIT, work=work, repeat=repeat, queued=True)
    expected = ours()

    def check(found: torch.Tensor) -> None:
        rtol, atol = (1e-4, 1e-5) if device == "cpu" else (2e-2, 2e-2)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)  # no number on a red check

    for name in BASELINES if only is None else only:
        if name != "sdpa" and device == "cpu":
            case.not_measured[name] = "needs a GPU"
        else:
            serve(case, name, lambda name=name: captured(_MAKE[name](q, keys, values), device), check)
    case.calls[LIMIT], case.limit_work = copy(device)
    return case


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


def queued_calls(heads: str, device: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """Ours and SDPA by what is called, at sizes where the device is done first; SDPA sees all rows, causally.

    `OPERATORS` is ours as `torch.library` operators, which torch.compile sees: what the plan took the place of.
    """
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

    found = {
        "forward": {OURS: lambda: ours(*plain), SDPA: lambda: sdpa(*plain)},
        "both": {OURS: both(ours), SDPA: both(sdpa)},
        "decoding": {
            OURS: lambda: gist_attention(q, k, v, decode, past_key=past_key, past_value=past_value),
            SDPA: lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True),
        },
    }
    return {
        what: {OURS: calls[OURS], OPERATORS: by_operators(calls[OURS]), SDPA: calls[SDPA]}
        for what, calls in found.items()
    }


def by_operators(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call without a plan. Its own share of the time is two assignments."""

    def called(*given: Any) -> Any:
        before, attention.needs_operators = attention.needs_operators, lambda *asked: True
        try:
            return call(*given)
        finally:
            attention.needs_operators = before

    return called


def microseconds(call: Callable[[], Any], rounds: int, device: str) -> dict[str, float]:
    """Of the host for one call: median, smallest and largest of the rounds; the first round does not count."""
    found = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return {"median": statistics.median(found[1:]), "min": min(found[1:]), "max": max(found[1:])}


def _packed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The query heads of one key head as its query rows, ``[B, Hkv, group, D]``: each key is then read once."""
    batch, heads, _, dim = q.shape
    return q.view(batch, k.shape[1], heads // k.shape[1], dim)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Decode:
    return lambda: F.scaled_dot_product_attention(_packed(q, k), k, v).view(q.shape)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Decode:
    # what SDPA calls when it chooses cuDNN: choosing it by a context would be on the clock
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return lambda: attend(_packed(q, k), k, v, None, False)[0].view(q.shape)


_MAKE = {"sdpa": _sdpa, "sdpa cuDNN": _cudnn}
