"""The rows of a batch that predict a label: their logits, their loss, how many they get right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gistkern.hf.handle import handle_of
from gistkern.layout import GistLayout
from gistkern.training.streams import IGNORED

__all__ = ["Tail", "bare", "tail_of", "tail_of_batch"]


@dataclass(frozen=True)
class Tail:
    """Logits ``[B, T, vocabulary]`` and the labels ``[B, T]`` that they predict, -100 where there is none.

    `answer` ``[T]`` numbers the answers within a row: columns that stand side by side in the stream are of one.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    answer: torch.Tensor

    def labeled(self) -> torch.Tensor:
        """bool ``[B, T]``."""
        return self.labels != IGNORED

    def rows(self) -> torch.Tensor:
        """Logits ``[labels, vocabulary]`` of the labeled rows, in at least fp32."""
        rows = self.logits[self.labeled()]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def cross_entropy(self, num_items: torch.Tensor | int | None = None) -> torch.Tensor:
        """Sum over the labels divided by `num_items`, by default their number."""
        total = F.cross_entropy(self.rows(), self.labels[self.labeled()], reduction="sum")
        return total / (self.labeled().sum() if num_items is None else num_items)

    @torch.no_grad()
    def counts(self) -> torch.Tensor:
        """int64 ``[4]``: labels that the most likely token hits, labels, answers with all hit, answers with labels."""
        wanted = self.labeled()
        right = (self.logits.argmax(-1) == self.labels) & wanted
        both = torch.stack([right, wanted]).long()
        of_answers = torch.zeros_like(both).index_add_(2, self.answer, both)
        answers = of_answers[1] > 0
        exact = (of_answers[0] == of_answers[1]) & answers
        return torch.stack([right.sum(), wanted.sum(), exact.sum(), answers.sum()])


def bare(model: nn.Module) -> Any:
    """The model inside a DistributedDataParallel wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def tail_of(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    layout: GistLayout | None = None,
    attention_mask: torch.Tensor | None = None,
    required: bool = True,
) -> Tail:
    """Run the model; its head computes logits for the columns before a label and for nothing else.

    A batch without labels is an error unless they are not `required`: one process of several may have none.

    Raises
    ------
    ValueError
        If the shapes differ or nothing is labeled.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels must be [batch, tokens] like input_ids {tuple(input_ids.shape)}, got {tuple(labels.shape)}"
        )
    handle = handle_of(bare(model))
    # as in a patched model's own loss: a gist token is never predicted
    targets = labels.masked_fill(handle.is_gist(labels), IGNORED)[:, 1:]
    columns = (targets != IGNORED).any(0).nonzero()[:, 0]
    if not len(columns) and not required:
        columns = columns.new_tensor([targets.shape[1] - 1])
    if not len(columns):
        raise ValueError("labels holds nothing to predict: label at least one token that is no gist, others -100")
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        gist_layout=layout,
        logits_to_keep=columns,
        use_cache=False,
    )
    gaps = torch.diff(columns, prepend=columns[:1]) > 1
    return Tail(output.logits, targets[:, columns], gaps.cumsum(0))


def tail_of_batch(model: nn.Module, batch: Mapping[str, Any], required: bool = True) -> Tail:
    """`tail_of` a batch as `GistDataCollator` makes it."""
    layout, mask = batch.get("gist_layout"), batch.get("attention_mask")
    return tail_of(model, batch["input_ids"], batch["labels"], layout, mask, required)
