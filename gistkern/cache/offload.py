"""Weights that accelerate keeps elsewhere between calls (``cpu_offload``, ``device_map`` with "cpu" or "disk")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["input_device", "on_device"]


def input_device(model: nn.Module) -> torch.device:
    """Where a transformers model takes its ids and gives its logits; its own `device` is "meta" while weights are away.

    Of a model that has no weights anywhere it is "meta" as well.
    """
    device: torch.device = model.device  # type: ignore[assignment]
    if device.type != "meta":
        return device
    for module in (*model.get_input_embeddings().modules(), *model.modules()):  # type: ignore[operator]
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):  # accelerate may have put several in one
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
    return device


@contextmanager
def on_device(module: nn.Module) -> Iterator[None]:
    """Inside, the module's own parameters and buffers are real tensors, as they are during its forward."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
