"""CUDA backend: the extension's decode and compaction kernels (csrc/), up to 8 query rows a sequence, no gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gistkern.backends import native
from gistkern.backends.native import compact, compact_into, pool_compact
from gistkern.kernels.arguments import AttentionArguments, DecodeArguments
from gistkern.kernels.device import facts_of

__all__ = [
    "compact",
    "compact_into",
    "forward",
    "pool_compact",
    "pool_decode",
    "prepared_decode",
    "prepared_pool_decode",
]

# whose operators check by themselves that no call reaches outside a buffer
CHECKED = frozenset({"forward", "compact", "compact_into", "pool_decode", "pool_compact"})


def forward(arguments: AttentionArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, Hq, N, D]`` and log-sum-exp ``[B, Hq, N]``."""
    return native.decode_rows(arguments.readable(), facts_of(arguments.q.device).multiprocessors)


def prepared_decode(arguments: AttentionArguments) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """See `native.prepared_decode`."""
    return native.prepared_decode(arguments, facts_of(arguments.q.device).multiprocessors)


def pool_decode(arguments: DecodeArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoding over a pool and a paged tail."""
    return native.pool_decode(arguments, facts_of(arguments.q.device).multiprocessors)


def prepared_pool_decode(arguments: DecodeArguments) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """See `native.prepared_pool_decode`."""
    return native.prepared_pool_decode(arguments, facts_of(arguments.q.device).multiprocessors)
