"""Inputs and error budgets for tests of the op, made in one place (also for tests of your own kernels)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gistkern.backends import reference
from gistkern.layout import GistLayout
from gistkern.ops.attention import gist_attention
from gistkern.rows import gather_rows

__all__ = ["Inputs", "assert_within_budget", "compare", "make_inputs"]

_LEAVES = ("q", "k", "v", "past_key", "past_value", "learned_sinks")
FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0


@dataclass(frozen=True)
class Inputs:
    """Inputs of one attention call, which take gradients, and the gradient of its output.

    Examples
    --------
    >>> from gistkern.testing import make_inputs
    >>> layout = GistLayout.from_segments([5, 7, 3], gists=2, tail=4)
    >>> inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=16)
    >>> sorted(inputs.leaves()), inputs.cast(torch.float64).q.dtype
    (['k', 'q', 'v'], torch.float64)
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    past_key: torch.Tensor | None
    past_value: torch.Tensor | None
    grad_out: torch.Tensor
    learned_sinks: torch.Tensor | None = None

    def leaves(self) -> dict[str, torch.Tensor]:
        """The inputs that take gradients, by name."""
        named = {name: getattr(self, name) for name in _LEAVES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def cast(self, dtype: torch.dtype) -> Inputs:
        """The same values (rounded to `dtype`) as new leaves."""

        def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        copied: dict[str, Any] = {name: copy(getattr(self, name)) for name in _LEAVES}
        return Inputs(**copied, grad_out=self.grad_out.to(dtype))


def make_inputs(
    layout: GistLayout,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    learned_sinks: bool = False,
) -> Inputs:
    """Normal random tensors that fit `layout`, on its device; learned sinks if they are wanted.

    Examples
    --------
    >>> from gistkern.testing import make_inputs
    >>> layout = GistLayout.from_segments([5, 7, 3], gists=2, tail=4)
    >>> inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=16)
    >>> inputs.q.shape, inputs.k.shape
    (torch.Size([1, 4, 25, 16]), torch.Size([1, 2, 25, 16]))
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(head_count: int, rows: int) -> torch.Tensor:
        values = torch.randn(layout.batch_size, head_count, rows, head_dim, generator=generator, dtype=torch.float64)
        return values.to(layout.device, dtype).requires_grad_()

    past_key, past_value = (draw(kv_heads, layout.past) if layout.past else None for _ in range(2))
    q, grad_out = (draw(heads, layout.num_rows) for _ in range(2))
    k, v = (draw(kv_heads, layout.num_local) for _ in range(2))
    sinks = draw(heads, 1)[0, :, 0, 0].detach().requires_grad_() if learned_sinks else None
    return Inputs(q, k, v, past_key, past_value, grad_out.detach(), sinks)


def _oracle(inputs: Inputs, layout: GistLayout) -> dict[str, torch.Tensor]:
    """Output, LSE and gradients of the dense reference in the inputs' own precision."""
    past = None if inputs.past_key is None else (inputs.past_key, inputs.past_value)
    sinks = inputs.learned_sinks
    out, lse = reference.from_layout(inputs.q, inputs.k, inputs.v, layout, past=past, learned_sinks=sinks)
    return _with_gradients(out, lse, inputs)


def _with_gradients(out: torch.Tensor, lse: torch.Tensor, inputs: Inputs) -> dict[str, torch.Tensor]:
    leaves = inputs.leaves()
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out, allow_unused=True)
    named = {
        f"d{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return {"out": out.detach(), "lse": lse.detach(), **named}


def compare(inputs: Inputs, layout: GistLayout, backend: str = "auto") -> None:
    """Check output, LSE and gradients of a backend against the fp64 reference, within the error budget.

    Raises
    ------
    AssertionError
        If an error exceeds twice (gradients: three times) that of the plain computation in the inputs'
        precision, or a NaN appears.

    Examples
    --------
    >>> from gistkern.testing import compare, make_inputs
    >>> layout = GistLayout.from_segments([5, 7, 3], gists=2, tail=4)
    >>> compare(make_inputs(layout, dtype=torch.bfloat16), layout, backend="auto")
    """
    given: dict[str, Any] = {n: getattr(inputs, n) for n in ("past_key", "past_value", "learned_sinks")}
    out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, **given, backend=backend, return_lse=True)
    ours = _with_gradients(out, lse, inputs)
    exact = _oracle(inputs.cast(torch.float64), layout)
    plain = _oracle(inputs.cast(inputs.q.dtype), layout)
    cancelled = _cancelled_terms(inputs.cast(torch.float64), layout)
    logit = _largest_logit(inputs, layout)
    for name, value in ours.items():
        factor = BACKWARD_FACTOR if name.startswith("d") else FORWARD_FACTOR
        size = cancelled.get(name, 0.0) * (1 + logit)
        if logit:
            size += logit * (1.0 if name == "lse" else exact[name].abs().max().item())
        assert_within_budget(name, value, exact[name], plain[name], factor, size)


def _cancelled_terms(inputs: Inputs, layout: GistLayout) -> dict[str, float]:
    """Largest terms of what is summed up with both signs.

    An LSE is a score, the largest, plus the logarithm of a sum: it may be smaller than either. dq and dk sum up
    differences ``p * (dp - delta)``. Where a row sees one key the two sides cancel exactly, in the plain computation by
    luck of its order of summation: then the rounding of the terms is the error that remains (docs/concepts/numerics.md,
    "Budgets").
    """
    compact = [gather_rows(t, layout.gather) for t in (inputs.k, inputs.v)]
    if inputs.past_key is not None and inputs.past_value is not None:
        past = (inputs.past_key, inputs.past_value)
        compact = [torch.cat([old, new], 2) for old, new in zip(past, compact, strict=True)]
    mask = layout.dense()
    scale = inputs.q.shape[-1] ** -0.5
    scores, keys = reference.dense_scores(inputs.q, inputs.k, compact[0], mask, scale)
    probabilities = scores.softmax(-1).nan_to_num()
    repeat = inputs.q.shape[1] // inputs.v.shape[1]
    values = torch.cat([compact[1], inputs.v], 2).repeat_interleave(repeat, 1)
    terms = probabilities * (inputs.grad_out.abs() @ values.abs().mT)
    largest = terms.max().item() * scale if terms.numel() else 0.0
    of_keys = largest * inputs.q.abs().max().item()
    seen = scores[scores.isfinite()].abs()
    of_lse = seen.max().item() if seen.numel() else 0.0
    return {"lse": of_lse, "dq": largest * keys.abs().max().item(), "dk": of_keys, "dpast_key": of_keys}


def _largest_logit(inputs: Inputs, layout: GistLayout) -> float:
    """Of learned sinks and the LSEs that they are put into; 0 without them.

    Nothing cancels the rounding of an LSE that is finished by then: probabilities are as exact, relatively, as the
    largest logit is absolutely.
    """
    if inputs.learned_sinks is None:
        return 0.0
    past = None if inputs.past_key is None else (inputs.past_key, inputs.past_value)
    _, lse = reference.from_layout(inputs.q, inputs.k, inputs.v, layout, past=past)
    logits = torch.cat([lse[lse.isfinite()].flatten(), inputs.learned_sinks]).detach()
    return logits.abs().max().item()


def assert_within_budget(
    name: str, ours: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, factor: float, cancelled: float = 0.0
) -> None:
    """Assert that our largest error is at most `factor` times the plain computation's, plus one rounding.

    `cancelled` is the size of terms that cancel in the result; their fp32 rounding is allowed for once.

    Examples
    --------
    >>> from gistkern.testing import assert_within_budget
    >>> exact = torch.randn(8, dtype=torch.float64)
    >>> rounded = exact.bfloat16()
    >>> assert_within_budget("out", rounded, exact, rounded, factor=2.0)
    """
    assert not ours.isnan().any(), f"{name} holds NaN"
    empty = exact == -torch.inf
    assert torch.equal(ours == -torch.inf, empty), f"{name}: -inf at other places than the reference"

    def error(value: torch.Tensor) -> float:
        difference = (value.double() - exact).masked_fill(empty, 0)
        return difference.abs().max().item() if difference.numel() else 0.0

    scale = exact.masked_fill(empty, 0).abs().max().item() if exact.numel() else 0.0
    # where the plain computation happens to be exact, the result's own rounding remains
    accumulate = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    budget = factor * error(plain) + torch.finfo(ours.dtype).eps * scale + accumulate * cancelled
    assert error(ours) <= budget, f"{name}: error {error(ours):.3g} exceeds the budget {budget:.3g}"
