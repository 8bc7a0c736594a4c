"""Muon for the matrices inside the layers, AdamW for everything else: one optimizer.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") reached the gates of the tiny
preset's first stages in about half of AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["MuonAdamW", "grouped"]

# of the polynomial whose iteration makes a matrix orthogonal, as in the publication
COEFFICIENTS, ITERATIONS, MOMENTUM = (3.4445, -4.7750, 2.0315), 5, 0.95


class MuonAdamW(torch.optim.AdamW):
    """AdamW, and Muon for the groups of parameters with ``muon=True``.

    torch has a Muon, for matrices alone, which computes in bfloat16: that took 80 ms of a 190 ms step of the tiny
    preset on a CPU without bfloat16 units; in fp32 it takes 5 ms. Its updates are scaled to the size of AdamW's (Liu et
    al. 2025, "Muon is scalable for LLM training").
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter."""
        matrices = [(group, one) for group in self.param_groups if group["muon"] for one in group["params"]]
        gradients = [one.grad for _, one in matrices]
        for (group, one), gradient in zip(matrices, gradients, strict=True):
            if gradient is not None:
                self._muon(one, gradient, group["lr"], group["weight_decay"])
            one.grad = None  # AdamW passes it over
        super().step(closure)
        for (_, one), gradient in zip(matrices, gradients, strict=True):
            one.grad = gradient

    def _muon(self, parameter: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            # AdamW counts steps in every state that it loads
            state |= {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros_like(parameter)}
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        update = _orthogonal(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
        parameter.mul_(1 - rate * decay)
        parameter.add_(update, alpha=-0.2 * rate * max(parameter.shape) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, about: singular values end between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def grouped(parameters: Iterable[tuple[str, torch.Tensor]], rate: float, muon: float, adamw: float) -> list[dict]:
    """Groups for `MuonAdamW`, whose rates are multiples of one; AdamW alone if the factor `muon` is 0."""
    groups: list[dict] = [
        {"params": [], "lr": rate * adamw, "muon": False},
        {"params": [], "lr": rate * muon, "muon": True},
    ]
    for name, one in parameters:
        if one.requires_grad:
            groups[bool(muon) and one.dim() == 2 and ".layers." in name]["params"].append(one)
    return [group for group in groups if group["params"]]
