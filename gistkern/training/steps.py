"""`StepDataset`: training data whose batches follow from the number of the step, so that resuming skips nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from gistkern.training.streams import IGNORED

__all__ = ["Share", "StepDataset", "unlabeled"]


@dataclass(frozen=True)
class Share:
    """The samples of a step that one process reads in one micro-batch: every `count`-th, from `index` on.

    Examples
    --------
    >>> from gistkern.training import Share
    >>> [list(Share(index, 2).own(5)) for index in range(2)]
    [[0, 2, 4], [1, 3]]
    """

    index: int = 0
    count: int = 1

    def own(self, size: int) -> range:
        """Places of this share's samples among the `size` of a step; none where there are fewer samples than shares."""
        return range(self.index, size, self.count)


class StepDataset(Dataset):
    """Data that `GistTrainer` asks for each step when the step begins, and never ahead of it.

    A batch follows from the step, its share, and what you keep yourself: a seed, and a curriculum's present stage. So
    a resumed run goes on as if nobody had stopped it, without reading again what it has read, and how many samples a
    step has is the data's affair, not that of the number of processes and micro-batches. `max_steps` of the
    TrainingArguments says how many steps there are at most; `per_device_train_batch_size` is not used.

    Examples
    --------
    >>> import torch
    >>> from gistkern.training import Share, StepDataset
    >>> class Counting(StepDataset):
    ...     def draw(self, step, share):
    ...         rows = torch.tensor([[step, place] for place in share.own(4)])
    ...         return {"input_ids": rows, "labels": rows}
    >>> Counting().draw(7, Share(1, 2))["input_ids"]
    tensor([[7, 1],
            [7, 3]])
    """

    @abstractmethod
    def draw(self, step: int, share: Share) -> dict[str, Any]:
        """The batch of this share of a step, as `GistDataCollator` makes batches.

        A share without a sample of its own still needs a batch, since every process takes part in every micro-batch:
        return any sample, `unlabeled`.
        """

    def __getitem__(self, index: Any) -> Any:
        """Refused: a step's batch is drawn, not picked."""
        raise TypeError("a StepDataset is drawn step by step: train on it with GistTrainer")


def unlabeled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of `GistDataCollator` without labels, in its teacher's stream and its reconstruction too.

    Examples
    --------
    >>> from gistkern.training import unlabeled
    >>> unlabeled({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, 6]])})["labels"]
    tensor([[-100, -100]])
    """
    found = {name: unlabeled(value) if isinstance(value, Mapping) else value for name, value in batch.items()}
    return {**found, "labels": torch.full_like(batch["labels"], IGNORED)}
