"""CUDA backend: the extension's decode and compaction kernels (csrc/), for up to 8 query rows a sequence, no gradients."""

from __future__ import annotations

import torch

from gistkern import native
from gistkern.compaction import dense_rows
from gistkern.kernels.device import facts_of

__all__ = ["compact", "forward"]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gist_k: torch.Tensor,
    gist_v: torch.Tensor,
    gist_begin: torch.Tensor,
    gist_end: torch.Tensor,
    local_begin: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, Hq, N, D]`` and log-sum-exp ``[B, Hq, N]``; arguments as `gistkern.ops`."""
    tensors = [dense_rows(t) for t in (q, k, v, gist_k, gist_v)]
    vectors = [t.contiguous() for t in (gist_begin, gist_end, local_begin)]
    return native.decode_rows(*tensors, *vectors, scale, facts_of(q.device).multiprocessors)


def compact(
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    gather: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact rows of keys and values in one launch; arguments as `gistkern.compaction`."""
    past = 0 if past_k is None else past_k.shape[2]
    shape = (*k.shape[:2], past + gather.shape[1], k.shape[3])
    out = k.new_empty(shape), v.new_empty(shape)
    rows = [None if t is None else dense_rows(t) for t in (k, v, past_k, past_v)]
    native.operators().compact(*rows, gather, None, *out, None, None)
    return out
