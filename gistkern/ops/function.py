"""Compaction and attention as one node of the autograd graph: what eager calls with gradients go through.

The operators of `gistkern.ops.library` are two nodes, with two full-size gradients of k and of v that autograd adds up.
They serve what has to see operators: torch.compile, tracing, dispatch modes, and gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.autograd import forward_ad

from gistkern.ops import library
from gistkern.ops.checks import refuse_forward_mode
from gistkern.ops.sinks import gradient_of_sinks, with_learned_sinks

__all__ = ["GistAttention", "Plan", "added", "apply", "of_compact_rows"]

Tensors = tuple[torch.Tensor | None, ...]


class Plan(Protocol):
    """What computes the calls of one layout on tensors of one kind (plan.py)."""

    backend: str  # a name of `gistkern.backends.BACKENDS`
    scale: float  # of the scores
    gathers: bool  # whether calls bring new compact rows; otherwise attention reads the past ones
    vectors: tuple[torch.Tensor, ...]  # gist_begin, gist_end, local_begin and gather, contiguous

    def check_unchanged(self) -> None:
        """Raise RuntimeError if one of the vectors was written to since the plan was made."""

    def forward(self, q, k, v, past_k, past_v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output ``[B, Hq, N, D]``, LSE ``[B, Hq, N]``, and compact rows ``[B, Hkv, G, D]`` of keys and values."""

    def again(self, whole: bool, q, k, v, past_k, past_v) -> Sequence[Any] | None:
        """As `forward`, if the plan is one for these tensors, and None if that is not known; without `whole`, less."""

    def backward(self, grad_out, q, k, v, gist_k, gist_v, out, lse) -> Tensors:
        """Gradients of q, k, v, and of past rows (None without); those of gathered rows are in k's and v's."""


class GistAttention(torch.autograd.Function):
    """Output; with `whole` also the LSE (not differentiable), and the compact rows where the call gathers new ones."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, whole: bool, sure: bool, q, k, v, past_k, past_v, learned_sinks
    ) -> torch.Tensor | Tensors | None:
        """As `Plan.forward`, and keep what the backward needs. What is not handed out costs autograd nothing.

        Unless it is `sure` that the plan is one for these tensors, None if `Plan.again` finds that it is not.
        """
        found = plan.forward(q, k, v, past_k, past_v) if sure else plan.again(True, q, k, v, past_k, past_v)
        if found is None:
            return None
        out, lse, gist_k, gist_v = found
        if learned_sinks is not None:
            out, lse = with_learned_sinks(out, lse, learned_sinks)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, gist_k, gist_v, out, lse, learned_sinks)
        if not whole:
            return out
        ctx.set_materialize_grads(False)  # the LSE's would be a tensor of zeros
        if not plan.gathers:
            ctx.mark_non_differentiable(lse)
            return out, lse
        # rows of keys and values that do not learn do not either: a cache would keep this call's graph alive with them
        ctx.mark_non_differentiable(lse, *(() if any(ctx.needs_input_grad[4:8]) else (gist_k, gist_v)))
        return out, lse, gist_k, gist_v

    @staticmethod
    def backward(ctx: Any, grad_out, _=None, grad_gist_k=None, grad_gist_v=None) -> Tensors:
        """None for what is no tensor, and the gradients of the six tensors."""
        saved = ctx.saved_tensors
        ctx.plan.check_unchanged()
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (None, None, None, *_by_operators(ctx.plan, saved, grad_out, grad_gist_k, grad_gist_v))
        q, k, v, gist_k, gist_v, out, lse, learned_sinks = saved
        dq = dk = dv = past_k = past_v = sinks = None
        if grad_out is not None:
            if forward_ad._current_level >= 0:
                refuse_forward_mode(grad_out)
            dq, dk, dv, past_k, past_v = ctx.plan.backward(grad_out, q, k, v, gist_k, gist_v, out, lse)
            if learned_sinks is not None and ctx.needs_input_grad[8]:
                sinks = gradient_of_sinks(grad_out, out, lse, learned_sinks)
        if grad_gist_k is not None or grad_gist_v is not None:  # somebody uses the compact rows themselves
            more = of_compact_rows(ctx.plan, k, gist_k, grad_gist_k, grad_gist_v)
            dk, dv, past_k, past_v = (added(a, b) for a, b in zip((dk, dv, past_k, past_v), more, strict=True))
        return None, None, None, dq, dk, dv, past_k, past_v, sinks


# beneath what `Function.apply` does for torch.func, under which no plan is run: a fifth of its time
apply = super(torch.autograd.Function, GistAttention).apply


def _by_operators(plan: Plan, saved: tuple[Any, ...], grad_out, grad_gist_k, grad_gist_v) -> Tensors:
    """The same by operators, whose own derivatives are known (compaction's) or refused (attention's)."""
    q, k, v, gist_k, gist_v, out, lse, learned_sinks = saved
    dq = dk = dv = sinks = None
    if grad_out is not None:
        seen = (q, k, v, gist_k, gist_v)
        dq, dk, dv, dgist_k, dgist_v = library.attention_backward(
            grad_out, *seen, out, lse, *plan.vectors[:3], plan.scale, plan.backend
        )
        grad_gist_k, grad_gist_v = added(grad_gist_k, dgist_k), added(grad_gist_v, dgist_v)
        if learned_sinks is not None:
            sinks = gradient_of_sinks(grad_out, out, lse, learned_sinks)
    more = of_compact_rows(plan, k, gist_k, grad_gist_k, grad_gist_v)
    return dq, added(dk, more[0]), added(dv, more[1]), more[2], more[3], sinks


def of_compact_rows(plan: Plan, k, gist_k, grad_k, grad_v) -> Tensors:
    """Gradients of k, v and past rows from those of the compact rows."""
    gather = plan.vectors[3]
    if grad_k is None and grad_v is None:
        return None, None, None, None
    grad_k, grad_v = (torch.zeros_like(gist_k) if grad is None else grad for grad in (grad_k, grad_v))
    past = gist_k.shape[2] - gather.shape[1]
    # copies of the past ones, not views: the caller may add into a gradient in place
    past_k, past_v = (grad[:, :, :past].clone() if past else None for grad in (grad_k, grad_v))
    if not gather.shape[1]:
        return None, None, past_k, past_v
    dk, dv = library.compact_backward(grad_k[:, :, past:], grad_v[:, :, past:], gather, k.shape[2], plan.backend)
    return dk, dv, past_k, past_v


def added(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of two gradients, of which None is no contribution."""
    if one is None or other is None:
        return one if other is None else other
    return one + other
