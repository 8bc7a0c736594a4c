"""Muon for the matrices inside the layers, AdamW for everything else, both from torch.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") reached the gates of the tiny
preset's first stages in about half of AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ranks import whole_tensor

__all__ = ["Muon", "Optimizers"]


class Muon(torch.optim.Muon):
    """torch's Muon with its Newton-Schulz iteration in fp32.

    torch computes it in bfloat16, which took 80 ms of a 190 ms step of the tiny preset on a CPU without
    bfloat16 units; in fp32 it takes 5 ms. Nesterov momentum and ``match_rms_adamw`` alone.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter."""
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - momentum)
                update = _orthogonal(parameter.grad.lerp(buffer, momentum), group["ns_coefficients"], group["ns_steps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * rate * max(parameter.shape) ** 0.5)


def _orthogonal(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, about: singular values end between 0.7 and 1.2."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Optimizers:
    """The two optimizers of a model's trainable parameters, stepped together; AdamW alone if `muon_factor` is 0.

    Learning rates are multiples of one rate; Muon's are scaled to the update size of AdamW
    (``match_rms_adamw``, Liu et al. 2025, "Muon is scalable for LLM training").
    """

    def __init__(self, model: nn.Module, muon_factor: float, adamw_factor: float, betas: tuple[float, float]) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        hidden = [p for p, name in self._names.items() if muon_factor and p.dim() == 2 and ".layers." in name]
        others = [p for p in self._names if not any(p is q for q in hidden)]
        self._all: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(others, betas=betas, weight_decay=0.01), adamw_factor)
        ]
        if hidden:
            self._all.append((Muon(hidden, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), muon_factor))

    def step(self, rate: float) -> None:
        """One update of every parameter, and no gradients left."""
        for optimizer, factor in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()

    def tensors(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """The optimizers' state by parameter name, for safetensors.

        Every process of a sharded model asks for it; one that is not to `keep` it gets nothing.
        """
        found = {}
        for name, state in self._states():
            for key, value in state.items():
                value = whole_tensor(value)
                if keep:
                    found[f"{name}/{key}"] = value.contiguous()
        return found

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned."""
        states, parameters = dict(self._states()), {name: parameter for parameter, name in self._names.items()}
        for name, value in tensors.items():
            owner, key = name.rsplit("/", 1)
            parameter = parameters[owner]
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            states[owner][key] = value

    def _states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for optimizer, _ in self._all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield self._names[parameter], optimizer.state[parameter]
