"""Gist attention of one shard: gather the compact rows of all ranks, then call the ordinary op."""

from __future__ import annotations

import torch

from gistkern.distributed.collectives import Group, gather_compact, with_halo
from gistkern.distributed.shards import ContextShard
from gistkern.ops.attention import AttentionOptions, attend

__all__ = ["parallel_attention"]


def parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shard: ContextShard,
    group: Group,
    *,
    scale: float | None = None,
    learned_sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Output of a shard's rows, each rank calling this with its own.

    Parameters
    ----------
    q : Tensor
        ``[B, Hq, N_r, D]``: queries of the shard's rows.
    k, v : Tensor
        ``[B, Hkv, N_r, D]``.
    shard : ContextShard
        This rank's, of `split_layout` on the layout of the whole context.
    group : ProcessGroup
        One rank per shard, in their order.
    scale, learned_sinks, backend
        As `gistkern.gist_attention`.

    Returns
    -------
    Tensor
        Like `q`. Gradients of k and v hold what all ranks' rows contribute.

    Examples
    --------
    >>> import torch.distributed as dist
    >>> from gistkern.distributed import parallel_attention, split_layout
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: one process per GPU
    >>> layout = GistLayout.from_segments([5, 6], gists=2, tail=3)
    >>> shard = split_layout(layout, dist.get_world_size())[dist.get_rank()]
    >>> q, k, v = torch.randn(3, 1, 2, layout.num_rows, 16).unbind()  # of the whole context, for show
    >>> out = parallel_attention(*(shard.take(t, 2) for t in (q, k, v)), shard, dist.group.WORLD)
    >>> torch.allclose(out, gist_attention(q, k, v, layout), atol=1e-5)
    True
    >>> dist.destroy_process_group()
    """
    gist_k, gist_v = gather_compact(k, v, shard, group)
    k, v = with_halo(k, v, shard, group)
    options = AttentionOptions(scale, backend, learned_sinks)
    return attend(q, k, v, shard.layout, options, past_key=gist_k, past_value=gist_v, wants_rows=False)[0]
