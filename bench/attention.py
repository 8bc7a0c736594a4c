"""Gist-masked attention beside its baselines: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from bench.baselines import BASELINES, OURS, Attention, Baseline
from bench.case import OURS as NAME
from bench.case import Case
from bench.limits import matmul
from bench.shapes import HEADS, layout_of
from bench.work import visible_pairs
from gistkern import GistLayout
from gistkern.testing import Inputs, make_inputs

__all__ = ["PASSES", "attention_case", "attention_plan"]

PASSES = ("forward", "both")
# of a product with fp32 accumulation; bf16 carries 8 bits
TOLERANCE = {torch.float32: (1e-4, 2e-5), torch.bfloat16: (2e-2, 2e-2)}
# operations per visible pair, head and dimension: two products forward, five backward, two operations each
OPERATIONS = {"forward": 4, "both": 14}
LIMIT = "matmul"


def attention_case(
    layout_name: str,
    rows: int,
    heads: str,
    passes: str = "forward",
    device: str = "cpu",
    only: Collection[str] | None = None,
) -> Case:
    """The calls of one layout and size, each checked against ours before it is one.

    Parameters
    ----------
    layout_name, rows, heads : str, int, str
        As `bench.shapes`.
    passes : str
        ``"forward"``, or ``"both"``: with the gradients of q, k and v.
    device : str
        ``"cpu"`` (fp32) or ``"cuda"`` (bf16).
    only : collection of str, optional
        Names of `BASELINES` to plan; all of them without.

    Raises
    ------
    AssertionError
        If a baseline computes something else.
    """
    layout, inputs = _inputs(layout_name, rows, heads, device)
    query_heads, dim = inputs.q.shape[1], inputs.q.shape[3]
    calls = {NAME: _call(OURS.plan(layout), inputs, passes)}
    expected = calls[NAME]()
    not_measured: dict[str, str] = {}
    for name, baseline in BASELINES.items():
        if only is not None and name not in only:
            continue
        if reason := _why_not(baseline, layout, query_heads, passes):
            not_measured[name] = reason
            continue
        call = _call(baseline.plan(layout), inputs, passes)
        if baseline.masked:  # no number on a red check
            _check(name, call(), expected)
        calls[name] = call
    pairs = visible_pairs(layout.to("cpu")) * query_heads
    work = OPERATIONS[passes] * dim * pairs
    calls[LIMIT], limit_work = matmul(work, device, inputs.q.dtype)
    return Case(device, calls, not_measured, LIMIT, work, limit_work)


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
    return layout, make_inputs(layout, heads=query_heads, kv_heads=kv_heads, head_dim=dim, dtype=dtype)


def _why_not(baseline: Baseline, layout: GistLayout, heads: int, passes: str) -> str:
    return baseline.why_not(layout, heads) or (baseline.no_backward(layout) if passes == "both" else "")


def _call(attend: Attention, inputs: Inputs, passes: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    if passes == "forward":
        given = [t.detach() for t in (inputs.q, inputs.k, inputs.v)]
        return lambda: (attend(*given),)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]

    def both() -> tuple[torch.Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out))

    return both


def _check(name: str, found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    rtol, atol = TOLERANCE[expected[0].dtype]
    for what, one, other in zip(("output", "dq", "dk", "dv"), found, expected, strict=False):
        # sums over many rows: the error grows with the largest term, not with each entry
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=atol * scale, msg=lambda text, what=what: f"{name}, {what}: {text}"
        )
