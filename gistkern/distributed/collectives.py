"""What ranks exchange under gist context parallelism: compact rows from all, a halo from one, the loss, and a check.

What a rank receives is counted (`count_traffic`). Every rank calls them in the same order, forward and backward, as
with any collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.distributed as dist

from gistkern.distributed.shards import ContextShard
from gistkern.layout import GistLayout
from gistkern.rows import gather_rows

__all__ = [
    "Group",
    "Traffic",
    "check_same",
    "count_traffic",
    "gather_compact",
    "gather_ranks",
    "record",
    "whole_loss",
    "with_halo",
]

Group: TypeAlias = dist.ProcessGroup


@dataclass(eq=False)  # nested counts are told apart by identity
class Traffic:
    """Bytes that this rank received, by kind: ``"gists"``, ``"halo"``, ``"logits"``, each also ``", gradients"``.

    Examples
    --------
    >>> from gistkern.distributed import Traffic
    >>> Traffic({"gists": 2048, "halo": 512}).total
    2560
    """

    received: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The bytes of all kinds together."""
        return sum(self.received.values())


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank receives for gist context parallelism within the block.

    Examples
    --------
    >>> from gistkern.distributed import count_traffic
    >>> with count_traffic() as traffic:
    ...     pass  # model calls of this rank, with patch(..., context_parallel=group)
    >>> traffic.total
    0
    """
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def record(kind: str, size: int) -> None:
    """Note that `size` bytes are received."""
    for traffic in _counting:
        traffic.received[kind] = traffic.received.get(kind, 0) + size


def gather_compact(
    k: torch.Tensor, v: torch.Tensor, shard: ContextShard, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compact rows ``[B, Hkv, G, D]`` of the whole context, from the k and v ``[B, Hkv, N_r, D]`` of all shards."""
    own = torch.stack([gather_rows(t, shard.own) for t in (k, v)])
    ranks = gather_ranks(own, group, "gists")  # [R, 2, B, H, W, D]
    rows = ranks.movedim(0, 3).flatten(3, 4)  # [2, B, H, R * W, D]
    return gather_rows(rows[0], shard.place), gather_rows(rows[1], shard.place)


def with_halo(k: torch.Tensor, v: torch.Tensor, shard: ContextShard, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v with the rows in front that the shard needs of the rank before; the next one gets its own."""
    if not any(shard.halos):
        return k, v
    halo = _Halo.apply(torch.stack([k, v]), shard.halos, group)
    return torch.cat([halo[0], k], 2), torch.cat([halo[1], v], 2)


def gather_ranks(rows: torch.Tensor, group: Group, kind: str = "logits") -> torch.Tensor:
    """``[R, ...]``: every rank's tensor, of the same shape on all; traffic counts as `kind`, and its gradients."""
    return _AllGather.apply(rows, group, kind)


class _AllGather(torch.autograd.Function):
    """Backward sums the gradients of this rank's tensor over all ranks (reduce-scatter)."""

    @staticmethod
    def forward(ctx, rows, group, kind):
        ctx.group, ctx.dtype, ctx.kind = group, rows.dtype, kind
        ranks = dist.get_world_size(group)
        gathered = rows.new_empty((ranks * len(rows), *rows.shape[1:]))
        dist.all_gather_single(gathered, rows.contiguous(), group=group)
        record(kind, (ranks - 1) * rows.nbytes)
        return gathered.unflatten(0, (ranks, -1))

    @staticmethod
    def backward(ctx, grad):
        # 16-bit partial sums would lose what the kernels keep
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        mine = torch.empty_like(wide[0])
        dist.reduce_scatter_single(mine, wide.flatten(0, 1), group=ctx.group)
        record(f"{ctx.kind}, gradients", (len(wide) - 1) * mine.nbytes)
        return mine.to(ctx.dtype), None, None


class _Halo(torch.autograd.Function):
    """The last rows of the rank before, as many as this one needs; backward gives their gradients back."""

    @staticmethod
    def forward(ctx, rows, halos, group):
        ctx.halos, ctx.group, ctx.shape = halos, group, rows.shape
        rank = dist.get_rank(group)
        needed = halos[rank]
        asked = halos[rank + 1] if rank + 1 < len(halos) else 0
        send = rows[..., rows.shape[-2] - asked :, :]
        halo = rows.new_empty((*rows.shape[:-2], needed, rows.shape[-1]))
        _swap(send, rank + 1, halo, rank - 1, group)
        record("halo", halo.nbytes)
        return halo

    @staticmethod
    def backward(ctx, grad):
        rank = dist.get_rank(ctx.group)
        asked = ctx.halos[rank + 1] if rank + 1 < len(ctx.halos) else 0
        received = grad.new_empty((*ctx.shape[:-2], asked, ctx.shape[-1]))
        _swap(grad, rank - 1, received, rank + 1, ctx.group)
        record("halo, gradients", received.nbytes)
        own = grad.new_zeros(ctx.shape)
        own[..., own.shape[-2] - asked :, :] = received
        return own, None, None


def _swap(send: torch.Tensor, to: int, receive: torch.Tensor, source: int, group: Group) -> None:
    """Send to one neighbor while receiving from the other; nothing where there is nothing."""
    steps = []
    if send.numel():
        steps.append(dist.P2POp(dist.isend, send.contiguous(), dist.get_global_rank(group, to), group))
    if receive.numel():
        steps.append(dist.P2POp(dist.irecv, receive, dist.get_global_rank(group, source), group))
    for work in dist.batch_isend_irecv(steps) if steps else ():
        work.wait()


def whole_loss(loss: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of all ranks' losses; its gradient is that of this rank's, times the size of the group."""
    return _WholeLoss.apply(loss, group)


class _WholeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, group):
        ctx.ranks = dist.get_world_size(group)
        whole = loss.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.ranks, None


def check_same(
    layout: GistLayout,
    group: Group,
    *,
    ids: torch.Tensor | None,
    embeds: torch.Tensor | None,
    labels: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> None:
    """Raise ValueError, on every rank, unless all were called with the same context and labels.

    One small exchange per call, so that ranks that were fed differently neither train on a mixture nor wait for
    each other in a collective that one of them never reaches.
    """
    given = {
        "input_ids": ids,
        "inputs_embeds": embeds,
        "labels": labels,
        "logits_to_keep": kept,
        "gist_layout": torch.cat([layout.gist_begin, layout.gist_end, layout.local_begin], 1),
        "positions": torch.cat([layout.stream_position, layout.gist_first_position], 1),
    }
    device = layout.device
    sums = torch.stack([_sum(tensor, device) for tensor in given.values()])  # [tensors]
    everyone = sums.new_empty(dist.get_world_size(group) * len(sums))
    dist.all_gather_single(everyone, sums, group=group)
    same = (everyone.unflatten(0, (-1, len(sums))) == sums).all(0).tolist()
    if not all(same):
        different = ", ".join(name for name, equal in zip(given, same, strict=True) if not equal)
        raise ValueError(
            f"the ranks of a context_parallel group were called with different {different}: each needs the whole of "
            "the same context (a sampler that gives every rank its own data must divide by the group's size)"
        )


def _sum(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """A number that other contents, shapes or places would change; -1 for none."""
    if tensor is None:
        return torch.tensor(-1, device=device)
    flat = tensor.detach().to(device).flatten()
    if flat.is_floating_point():
        flat = flat.double().view(torch.int64)
    weight = torch.arange(1, flat.numel() + 1, device=device)
    return (flat.long() * weight).sum() + len(tensor)
