"""Context parallelism in a patched model: every rank is called with the whole context and computes its shard.

The loss is that of the whole context, on every rank. Its gradients are for averaging over ranks, as DDP and FSDP do:
each rank's are multiplied by the size of the group, so that the mean over the group is the gradient of one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gistkern.distributed import ContextShard, split_layout
from gistkern.distributed.collectives import Group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from gistkern.layout import GistLayout

__all__ = ["Parallel", "group_of", "row_cost", "shard_of", "split_labels", "whole_loss"]


@dataclass(frozen=True)
class Parallel:
    """A shard and the group that it is exchanged in."""

    shard: ContextShard
    group: Group


def group_of(given: Group | DeviceMesh) -> Group:
    """The process group of `context_parallel`: itself, or that of a mesh of one dimension."""
    if isinstance(given, dist.ProcessGroup):
        return given
    if getattr(given, "ndim", None) == 1:
        return given.get_group()
    raise ValueError(
        "context_parallel must be a torch.distributed process group or a DeviceMesh of one dimension "
        f"(mesh['cp'] of a larger one), got {given!r}"
    )


def row_cost(inner: torch.nn.Module) -> float:
    """What a layer costs a row beside attention, in (query, key) pairs: two operations per weight of its matrices."""
    config: Any = inner.config
    weights = sum(p.numel() for name, p in inner.named_parameters() if name.startswith("layers.0.") and p.dim() == 2)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * weights / (4 * head_dim * config.num_attention_heads)


def shard_of(layout: GistLayout, group: Group, cost: float, ids: torch.Tensor | None) -> Parallel:
    """This rank's shard of a whole context.

    Raises
    ------
    ValueError
        If the ranks of the group were called with different contexts.
    """
    _check_same(layout, group, ids)
    ranks = dist.get_world_size(group)
    return Parallel(split_layout(layout, ranks, cost)[dist.get_rank(group)], group)


def _check_same(layout: GistLayout, group: Group, ids: torch.Tensor | None) -> None:
    """One small exchange per call, so that ranks that were fed differently do not train on a mixture."""
    given = ids if ids is not None else layout.is_gist.long()
    weight = torch.arange(1, given.numel() + 1, device=given.device)
    sums = [given.shape[0], given.shape[1], (given.flatten() * weight).sum(), layout.gist_end.sum()]
    mine = torch.stack([torch.as_tensor(one, device=given.device).long() for one in sums])
    everyone = mine.new_empty(dist.get_world_size(group) * len(mine))
    dist.all_gather_single(everyone, mine, group=group)
    if not bool((everyone.unflatten(0, (-1, len(mine))) == mine).all()):
        raise ValueError(
            "the ranks of a context_parallel group were called with different contexts: each needs the whole of the "
            "same one (a sampler that gives every rank its own data must divide by the group's size)"
        )


def split_labels(arguments: dict[str, Any], shard: ContextShard) -> None:
    """Labels of the shard's rows, shifted before they are cut, and how many the whole context has."""
    labels = arguments.get("labels")
    if labels is None:
        return
    shifted = arguments.get("shift_labels")
    if shifted is None:
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if arguments.get("num_items_in_batch") is None:
        arguments["num_items_in_batch"] = shifted.ne(-100).sum().clamp(min=1)
    arguments["shift_labels"] = shard.take(shifted).contiguous()
    arguments["labels"] = shard.take(labels)


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
