"""The processes of a training run, as torchrun and `accelerate launch` start them: each computes a part of a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["WHOLE", "Ranks", "Share", "whole_tensor"]


@dataclass(frozen=True)
class Share:
    """Every `count`-th sample of a batch, from the one at `index` on."""

    index: int
    count: int

    def own(self, size: int) -> range:
        """The places, in a batch of `size` samples, of this share: at least one."""
        return range(self.index, size, self.count) if self.index < size else range(1)

    def weight(self, size: int) -> float:
        """Its samples' part of the batch: 0 for a share that computes a sample of another for want of its own."""
        return len(range(self.index, size, self.count)) / size


WHOLE = Share(0, 1)


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is; one by itself needs no process group.

    With `sharded` parameters, gradients and the optimizers' states lie in parts on the processes (FSDP2), otherwise
    every process holds them all (DDP).
    """

    index: int = 0
    count: int = 1
    sharded: bool = False

    @classmethod
    def started(cls, sharded: bool = False) -> Ranks:
        """This process as its launcher describes it in the environment; connects to the others.

        ``accelerate launch --use_fsdp`` asks for a `sharded` model too. Raises ValueError if that has one process only.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        sharded = sharded or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if count == 1:
            if sharded:
                raise ValueError("FSDP shares the model between processes, and there is one: start several (torchrun)")
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size(), sharded)

    @property
    def is_main(self) -> bool:
        """Whether this process writes, shows and evaluates."""
        return self.index == 0

    def shared(self, model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
        """The model whose gradients are means over the processes; itself where there is one.

        Sharding replaces the model's parameters, so optimizers are made after it.
        """
        if self.count == 1:
            return model
        if not self.sharded:
            return DistributedDataParallel(model)
        mesh = dist.init_device_mesh("cpu", (self.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def micro_batches(self, model: nn.Module, count: int) -> Iterator[tuple[Share, bool, AbstractContextManager]]:
        """This process's part of a batch in `count` shares, whether each is the last, and what to compute it under.

        Gradients add up, and are exchanged with the last, which is the one that has samples if any has.
        """
        for place in reversed(range(count)):
            last = place == 0
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            waits = isinstance(model, DistributedDataParallel) and not last
            yield (
                Share(self.index + place * self.count, count * self.count),
                last,
                (model.no_sync() if waits else nullcontext()),
            )

    def all_idle(self, share: Share, size: int) -> bool:
        """Whether no process has samples of a batch of `size` in this micro-batch; if one has, all must compute it."""
        return share.index - self.index >= size

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the processes."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        """Disconnect: what follows is for the main process alone."""
        if self.count > 1:
            dist.destroy_process_group()


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together, which all processes take part in; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
