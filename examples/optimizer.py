"""Muon for the matrices inside the layers, AdamW for everything else, both from torch.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") reached the gates of the tiny
preset's first stages in about half of AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["Optimizers"]


class Optimizers:
    """The two optimizers of a model, stepped together.

    Learning rates are multiples of one rate; Muon's are scaled to the update size of AdamW
    (``match_rms_adamw``, Liu et al. 2025, "Muon is scalable for LLM training").
    """

    def __init__(self, model: nn.Module, muon_factor: float, adamw_factor: float) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        hidden = [p for p, name in self._names.items() if p.dim() == 2 and ".layers." in name]
        others = [p for p in self._names if not any(p is q for q in hidden)]
        self._all = (
            (torch.optim.Muon(hidden, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), muon_factor),
            (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01), adamw_factor),
        )

    def step(self, rate: float) -> None:
        """One update of every parameter, and no gradients left."""
        for optimizer, factor in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimizers' state by parameter name, for safetensors."""
        return {f"{name}/{key}": value.contiguous() for name, state in self._states() for key, value in state.items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned."""
        states = dict(self._states())
        for name, value in tensors.items():
            parameter, key = name.rsplit("/", 1)
            states[parameter][key] = value

    def _states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for optimizer, _ in self._all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield self._names[parameter], optimizer.state[parameter]
