"""CUDA backend: the extension's decode and compaction kernels (csrc/), up to 8 query rows a sequence, no gradients."""

from __future__ import annotations

import torch

from gistkern.backends import native
from gistkern.backends.native import pool_compact
from gistkern.kernels.arguments import AttentionArguments, DecodeArguments
from gistkern.kernels.device import facts_of
from gistkern.rows import dense_rows

__all__ = ["compact", "forward", "pool_compact", "pool_decode"]

# whose operators check by themselves that no call reaches outside a buffer
CHECKED = frozenset({"forward", "compact", "pool_decode", "pool_compact"})


def forward(arguments: AttentionArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, Hq, N, D]`` and log-sum-exp ``[B, Hq, N]``."""
    return native.decode_rows(arguments.readable(), facts_of(arguments.q.device).multiprocessors)


def compact(
    k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact rows of keys and values in one launch; arguments as `gistkern.rows`."""
    past = 0 if past_k is None else past_k.shape[2]
    shape = (*k.shape[:2], past + gather.shape[1], k.shape[3])
    out = k.new_empty(shape), v.new_empty(shape)
    rows = [None if t is None else dense_rows(t) for t in (k, v, past_k, past_v)]
    native.operators().compact(*rows, gather, None, *out, None, None)
    return out


def pool_decode(arguments: DecodeArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoding over a pool and a paged tail."""
    return native.pool_decode(arguments, facts_of(arguments.q.device).multiprocessors)
