"""The processes of a training run, as torchrun and `accelerate launch` start them: each computes a part of a batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """Which process of how many this is; one by itself needs no process group."""

    index: int = 0
    count: int = 1

    @classmethod
    def started(cls) -> Ranks:
        """This process as its launcher describes it in the environment; connects to the others."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process writes, shows and evaluates."""
        return self.index == 0

    def shared(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are means over the processes; itself where there is one."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def own(self, size: int) -> range:
        """The places of a batch of `size` samples that are this process's, at least one."""
        return range(self.index, size, self.count) if self.index < size else range(1)

    def weight(self, size: int) -> float:
        """Its samples' part of the batch: 0 for a process that computes a sample of another for want of its own."""
        return len(range(self.index, size, self.count)) / size

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
