"""What a model says when it reads gist rows alone: compress, ask, generate, compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gistkern.hf.compress import compress
from gistkern.layout.streams import left_padded
from gistkern.training.collator import GistDataCollator
from gistkern.training.tail import bare

__all__ = ["Generated", "generate_answers", "generation_metrics"]


@dataclass(frozen=True)
class Generated:
    """Token ids that were said to each question, and those of the right answers, in the order of the features."""

    predictions: list[list[int]]
    labels: list[list[int]]


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    collator: GistDataCollator,
    features: Sequence[Mapping[str, Any]],
    max_new_tokens: int | None = None,
) -> Generated:
    """Compress the contexts of `features`, then say what follows their questions, greedily, as one batch.

    Parameters
    ----------
    model : nn.Module
        Patched; wrapped by peft or DistributedDataParallel will do.
    collator : GistDataCollator
        Cuts contexts into segments as in training.
    features : sequence of mapping
        As the collator takes them, and checked by it.
    max_new_tokens : int, optional
        Most tokens to say; without it each answer gets as many as the right one has. What follows a token that ends
        generation is left out, that token too.
    """
    samples = collator.parts(features)
    labels = [sample["answer"].tolist() for sample in samples]
    base = bare(model)
    device = next(base.parameters()).device
    contexts, seen = left_padded([sample["context"].to(device) for sample in samples], collator.pad_id)
    questions, asked = left_padded([sample["question"].to(device) for sample in samples], collator.pad_id)
    streams = collator.streams
    cache = compress(base, contexts, seen, streams.segment_length, streams.segment_overlap)
    said = base.generate(
        input_ids=questions,
        attention_mask=asked.long(),
        past_key_values=cache,
        max_new_tokens=max_new_tokens or max(map(len, labels)),
        do_sample=False,
        pad_token_id=collator.pad_id,
    )[:, questions.shape[1] :].tolist()
    ends = base.generation_config.eos_token_id
    known = set(ends if isinstance(ends, list) else [ends])
    lengths = [max_new_tokens or len(label) for label in labels]
    return Generated([_ended(row[:length], known) for row, length in zip(said, lengths, strict=True)], labels)


def _ended(row: list[int], ends: set[int | None]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


def generation_metrics(generated: Generated) -> dict[str, float]:
    """Parts of the answers that are `exact`, that hold the right one somewhere (`contained`), and of its tokens.

    `token_accuracy` counts the tokens of the right answers that were said in their place (the digits of a key, say).

    Examples
    --------
    >>> from gistkern.training.generation import Generated, generation_metrics
    >>> generation_metrics(Generated([[1, 2], [9, 3, 4]], [[1, 2], [3, 4]]))
    {'exact': 0.5, 'contained': 1.0, 'token_accuracy': 0.5}
    """
    exact = contained = right = total = 0
    for said, label in zip(generated.predictions, generated.labels, strict=True):
        exact += said == label
        contained += any(said[at : at + len(label)] == label for at in range(len(said) - len(label) + 1))
        right += sum(one == other for one, other in zip(said, label, strict=False))
        total += len(label)
    count = len(generated.labels)
    return {"exact": exact / count, "contained": contained / count, "token_accuracy": right / total}
