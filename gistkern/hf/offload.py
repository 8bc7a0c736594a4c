"""Weights that accelerate keeps elsewhere between calls (``cpu_offload``, ``device_map`` with "cpu" or "disk")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["on_device"]


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
