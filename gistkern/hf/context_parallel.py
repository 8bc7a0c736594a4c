"""Context parallelism in a patched model: every rank is called with the whole context and computes its shard.

The loss is that of the whole context, on every rank. Its gradients are for averaging over ranks, as DDP and FSDP do:
each rank's are multiplied by the size of the group, so that the mean over the group is the gradient of one process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from gistkern.distributed import ContextShard, split_layout
from gistkern.distributed.attention import parallel_attention
from gistkern.distributed.collectives import Group, gather_ranks
from gistkern.distributed.shards import exchange

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from gistkern.layout import GistLayout
    from gistkern.ops.attention import AttentionOptions

__all__ = [
    "Parallel",
    "group_of",
    "kept_columns",
    "own_columns",
    "row_cost",
    "shard_of",
    "split_labels",
    "whole_logits",
]


@dataclass(frozen=True)
class Parallel:
    """A shard and the group that it is exchanged in.

    `kept` are the columns of the whole context whose logits every rank gets (``logits_to_keep``), if not its shard's.
    """

    shard: ContextShard
    group: Group
    kept: torch.Tensor | None = None

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: GistLayout,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of the shard's rows, which see other ranks' gist rows; `layout` is the shard's for this layer."""
        shard = replace(self.shard, layout=layout)
        return parallel_attention(q, k, v, shard, self.group, **options._asdict())


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


def shard_of(layout: GistLayout, group: Group, cost: float, kept: torch.Tensor | None) -> Parallel:
    """This rank's shard of a whole context."""
    ranks = dist.get_world_size(group)
    return Parallel(split_layout(layout, ranks, cost)[dist.get_rank(group)], group, kept)


def kept_columns(arguments: dict[str, Any], rows: int) -> torch.Tensor | None:
    """int64 ``[T]``: the columns of the whole context that `logits_to_keep` names; None where it names none."""
    keep = arguments.get("logits_to_keep")
    if keep is None or (isinstance(keep, int) and keep == 0):
        return None
    if arguments.get("labels") is not None:
        raise ValueError(
            "labels are of the whole context, logits_to_keep leaves columns out of it: under context_parallel pass one "
            "of them (gistkern.training.answer_loss takes the labels and keeps their columns)"
        )
    if isinstance(keep, int):
        return torch.arange(max(0, rows - keep), rows)
    if keep.dim() != 1 or keep.dtype != torch.int64 or (len(keep) and not 0 <= keep.min() <= keep.max() < rows):
        raise ValueError(f"logits_to_keep must be a number, or int64 [T] columns below {rows}, got {keep!r}")
    return keep


def own_columns(parallel: Parallel) -> torch.Tensor:
    """int64: those of the kept columns that lie in this rank's shard, counted from its first row."""
    own, _ = _exchanged(parallel)
    mine = own[parallel.shard.rank][0]
    return mine[mine >= 0]


def whole_logits(logits: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """Logits ``[B, T, vocabulary]`` of the kept columns, on every rank, from each shard's own.

    A loss that every rank computes of them has the gradient of one process times the size of the group, as needed for
    averaging: the backward sums what all ranks, equally, ask of each.
    """
    own, place = _exchanged(parallel)
    padded = torch.nn.functional.pad(logits, (0, 0, 0, own[0].shape[1] - logits.shape[1]))
    every = gather_ranks(padded, parallel.group).movedim(0, 1).flatten(1, 2)  # [B, R * width, vocabulary]
    return every[:, place[0].to(every.device)]


def _exchanged(parallel: Parallel) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Kept columns are exchanged as compact rows are: what each rank owes, and where all then stand."""
    assert parallel.kept is not None
    return exchange(parallel.kept[None], parallel.shard.cuts)


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
