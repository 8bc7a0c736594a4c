"""Compaction and attention as one node of the autograd graph: what eager calls with gradients go through.

The operators of `gistkern.ops.library` would be two nodes, with two gradients of k and v of full size that autograd
adds up. They serve what must see operators: torch.compile, tracing, dispatch modes, and gradients of gradients.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from gistkern.ops import library
from gistkern.ops.sinks import gradient_of_sinks, with_learned_sinks

__all__ = ["GistAttention", "Plan"]


class Plan(Protocol):
    """What runs the calls of one layout on tensors of one kind; `gistkern.ops.plan` makes them."""

    scale: float
    backend: str
    gathers: bool  # whether calls bring new compact rows
    vectors: tuple[torch.Tensor, ...]  # gist_begin, gist_end, local_begin and gather

    def forward(self, q, k, v, past_k, past_v) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, LSE, and the compact rows of keys and values."""

    def backward(self, grad_out, q, k, v, gist_k, gist_v, out, lse) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k, v and the past rows (None without), those of gathered rows added into k's and v's."""
