"""Gist-masked attention beside its baselines: forward, backward, and both."""

from collections.abc import Callable, Collection
from typing import Any

import torch

from bench.counted.work import visible_pairs
from bench.measured.baselines import BASELINES, OURS, Attention, Baseline
from bench.measured.case import OURS as NAME
from bench.measured.case import Case, serve
from bench.measured.timing import matmul
from bench.shapes import HEADS, layout_of
from gistkern import GistLayout
from gistkern.testing import Inputs

PASSES = ("forward", "backward", "both")
# of a product with fp32 accumulation: relative to each entry, to the largest entry, and of the whole tensor's norm;
# bf16 carries 8 bits, and a baseline that calls once per segment sums a gist's gradient over hundreds of them in bf16
TOLERANCE = {torch.float32: (1e-4, 2e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2, 2e-2)}
# operations per visible pair, head and dimension: two products forward, five backward, two operations each
OPERATIONS = {"forward": 4, "backward": 10, "both": 14}
LIMIT = "matmul"


def attention_case(
    layout_name: str,
    rows: int,
    heads: str,
    passes: str = "forward",
    device: str = "cpu",
    only: Collection[str] | None = None,
) -> Case:
    """The calls of one layout and size (as `bench.shapes`), of all `BASELINES` or `only` some.

    Each is checked against ours before it is one: an AssertionError if a baseline computes something else.
    ``"backward"`` is the gradients of q, k and v of a forward made before; fp32 on a CPU, bf16 on a GPU.
    """
    layout, inputs = _inputs(layout_name, rows, heads, device)
    query_heads, dim = inputs.q.shape[1], inputs.q.shape[3]
    case = Case(device, {NAME: _call(OURS.plan(layout), inputs, passes)}, limit=LIMIT, queued=True)
    expected = case.calls[NAME]()
    for name, baseline in BASELINES.items():
        if only is not None and name not in only:
            continue
        if reason := _why_not(baseline, layout, query_heads, passes):
            case.not_measured[name] = reason
            continue
        serve(
            case,
            name,
            lambda b=baseline: _call(b.plan(layout), inputs, passes),
            # no number on a red check
            lambda found, name=name, b=baseline: _check(name, found, expected, passes) if b.masked else None,
        )
    pairs = visible_pairs(layout.to("cpu")) * query_heads
    case.work = OPERATIONS[passes] * dim * pairs
    case.calls[LIMIT], case.limit_work = matmul(case.work, device, inputs.q.dtype)
    case.calls[LIMIT]()  # as all the others have been: the first product on a GPU loads its library
    return case


def attention_plan(
    name: str, layout_name: str, rows: int, heads: str, passes: str, device: str
) -> Callable[[], Callable[[], Any]] | str:
    """The plan of one call of `attention_case`, not made yet and not checked, or why it cannot serve."""
    layout, inputs = _inputs(layout_name, rows, heads, device)
    baseline = OURS if name == NAME else BASELINES[name]
    reason = _why_not(baseline, layout, inputs.q.shape[1], passes)
    return reason or (lambda: _call(baseline.plan(layout), inputs, passes))


def _inputs(layout_name: str, rows: int, heads: str, device: str) -> tuple[GistLayout, Inputs]:
    query_heads, kv_heads, dim = HEADS[heads]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layout = layout_of(layout_name, rows).to(device)
    generator = torch.Generator(device).manual_seed(0)  # drawn where they stay: gigabytes at 131,072 rows

    def draw(count: int) -> torch.Tensor:
        return torch.randn(1, count, layout.num_rows, dim, generator=generator, device=device, dtype=dtype)

    q, grad_out = draw(query_heads), draw(query_heads)
    return layout, Inputs(q, draw(kv_heads), draw(kv_heads), None, None, grad_out)


def _why_not(baseline: Baseline, layout: GistLayout, heads: int, passes: str) -> str:
    return baseline.why_not(layout, heads) or ("" if passes == "forward" else baseline.no_backward(layout))


def _call(attend: Attention, inputs: Inputs, passes: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    if passes == "forward":
        given = [t.detach() for t in (inputs.q, inputs.k, inputs.v)]
        return lambda: (attend(*given),)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    if passes == "backward":
        made = attend(*leaves)
        return lambda: torch.autograd.grad(made, leaves, inputs.grad_out, retain_graph=True)

    def both() -> tuple[torch.Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out))

    return both


def _check(name: str, found: tuple[Any, ...], expected: tuple[Any, ...], passes: str) -> None:
    """Entry by entry, and as a whole: rounding is spread evenly, a mask that is wrong somewhere is not."""
    rtol, atol, norm = TOLERANCE[expected[0].dtype]
    what = ("dq", "dk", "dv") if passes == "backward" else ("output", "dq", "dk", "dv")
    for part, one, other in zip(what, found, expected, strict=passes != "forward"):
        # sums over many rows: the error grows with the largest term, not with each entry
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=atol * scale, msg=lambda text, part=part: f"{name}, {part}: {text}"
        )
        error = ((one.float() - other.float()).norm() / other.float().norm()).item()
        assert error <= norm, f"{name}, {part}: relative error {error:.1e} of the whole, at most {norm:g} expected"
