"""Learned sinks: one logit per head that takes part in the softmax and carries no value (docs/concepts/numerics.md).

No kernel knows them. They are put into what a kernel answers, and its own backward is right for what comes out.
"""

from __future__ import annotations

import torch

from gistkern.ops.checks import refuse_second_derivative

__all__ = ["check_learned_sinks", "gradient_of_sinks", "with_learned_sinks"]


def check_learned_sinks(learned_sinks: torch.Tensor | None, q: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless there are none, or one float for each query head on the device of `q`."""
    if learned_sinks is None:
        return
    if not torch.is_tensor(learned_sinks):
        raise TypeError(f"learned_sinks must be a tensor, got {type(learned_sinks).__name__}")
    if tuple(learned_sinks.shape) != (q.shape[1],) or not learned_sinks.is_floating_point():
        raise ValueError(
            f"learned_sinks must be floats [{q.shape[1]}], one for each query head, "
            f"got {learned_sinks.dtype} {tuple(learned_sinks.shape)}"
        )
    if learned_sinks.device != q.device:
        raise ValueError(f"learned_sinks is on {learned_sinks.device}, q on {q.device}: use one device")


def with_learned_sinks(
    out: torch.Tensor, lse: torch.Tensor, learned_sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, Hq, N, D]`` (changed in place) and LSE ``[B, Hq, N]`` with a logit ``[Hq]`` more in each softmax.

    Rows that see nothing stay 0 and -inf.
    """
    if learned_sinks is None:
        return out, lse
    empty = lse == -torch.inf
    joint = torch.logaddexp(lse, learned_sinks.to(lse.dtype)[:, None]).masked_fill(empty, -torch.inf)
    share = (lse - joint).exp().masked_fill(empty, 0)  # of the probability, what the rows keep
    return out.mul_(share[..., None]), joint


_library = torch.library.Library("gistkern", "FRAGMENT")
_library.define("learned_sinks_backward(Tensor grad_out, Tensor out, Tensor lse, Tensor learned_sinks) -> Tensor")


@torch.library.impl(_library, "learned_sinks_backward", "CompositeExplicitAutograd")
def _gradient(grad_out, out, lse, learned_sinks):
    wide = lse.dtype
    share = (learned_sinks.to(wide)[:, None] - lse).exp().masked_fill(lse == -torch.inf, 0)  # what the sink takes
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
    return -(share * delta).sum((0, 2)).to(learned_sinks.dtype)


@torch.library.register_fake("gistkern::learned_sinks_backward", lib=_library)
def _gradient_fake(grad_out, out, lse, learned_sinks):
    return torch.empty_like(learned_sinks)


torch.library.register_autograd("gistkern::learned_sinks_backward", refuse_second_derivative, lib=_library)

gradient_of_sinks = torch.ops.gistkern.learned_sinks_backward.default
