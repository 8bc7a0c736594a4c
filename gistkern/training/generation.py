"""What a model says when it reads gist rows alone: compress, ask, generate, compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gistkern.cache.cache import GistCache
from gistkern.hf.compress import compress
from gistkern.layout.streams import left_padded
from gistkern.training.collator import GistDataCollator
from gistkern.training.tail import bare

__all__ = ["AnswerEvaluation", "Generated", "generate_answers", "generation_metrics", "prompted_answers"]


@dataclass(frozen=True)
class Generated:
    """Token ids that were said to each question, and those of the right answers, in the order of the features.

    Both without the token that ends generation. `rows` counts the rows that each answer was read from, of `row_bytes`
    each in all layers.
    """

    predictions: list[list[int]]
    labels: list[list[int]]
    rows: list[int] = field(default_factory=list, compare=False)
    row_bytes: float = field(default=0.0, compare=False)


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
    columns = cache.layers[0].gist.key.shape[2]
    rows, row_bytes = cache.gist_rows.tolist(), cache.nbytes / (len(samples) * columns)
    said = _said(base, questions, asked, max_new_tokens or max(map(len, labels)), collator.pad_id, cache)
    lengths = [max_new_tokens or len(label) for label in labels]
    ends = _ends(base)
    predictions = [_ended(row[:length], ends) for row, length in zip(said, lengths, strict=True)]
    return Generated(predictions, [_ended(label, ends) for label in labels], rows, row_bytes)


@torch.no_grad()
def prompted_answers(
    model: nn.Module, prompts: Sequence[torch.Tensor], max_new_tokens: int, pad_id: int
) -> list[list[int]]:
    """What follows prompts (int64 ``[tokens]`` each) in which all is in sight, greedily, as one batch."""
    base = bare(model)
    ids, mask = left_padded([one.to(next(base.parameters()).device) for one in prompts], pad_id)
    return [_ended(row, _ends(base)) for row in _said(base, ids, mask, max_new_tokens, pad_id)]


def _said(
    base: Any, ids: torch.Tensor, mask: torch.Tensor, most: int, pad_id: int, cache: GistCache | None = None
) -> list[list[int]]:
    more = {} if cache is None else {"past_key_values": cache}
    how = {"max_new_tokens": most, "do_sample": False, "pad_token_id": pad_id}
    out = base.generate(input_ids=ids, attention_mask=mask.long(), **how, **more)
    return out[:, ids.shape[1] :].tolist()


def _ends(base: Any) -> set[int | None]:
    ends = base.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


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
    return {"exact": exact / count, "contained": contained / count, "token_accuracy": right / max(1, total)}


@dataclass(frozen=True)
class AnswerEvaluation:
    """Which answers `GistTrainer` generates in each evaluation, and how they are measured.

    Parameters
    ----------
    samples : int
        Of the data set, from its first on; at most.
    max_new_tokens : int, optional
        As of `GistTrainer.evaluate_generation`.
    metrics : callable
        Makes named numbers of what was `Generated`.
    best : str
        One of them: `generation_best` repeats it, and of equal ones is greater where the loss is lower. So
        ``metric_for_best_model="generation_best"`` keeps no early checkpoint that answers no better than the last.

    Examples
    --------
    >>> from gistkern.training import AnswerEvaluation
    >>> from gistkern.training.generation import Generated
    >>> evaluation = AnswerEvaluation(samples=50, max_new_tokens=8, best="contained")
    >>> evaluation.measured(Generated([[1, 2], [9, 3, 4]], [[1, 2], [3, 4]]), loss=None)
    {'exact': 0.5, 'contained': 1.0, 'token_accuracy': 0.5, 'best': 1.0}
    """

    samples: int = 100
    max_new_tokens: int | None = None
    metrics: Callable[[Generated], dict[str, float]] = generation_metrics
    best: str = "exact"

    def measured(self, generated: Generated, loss: float | None) -> dict[str, float]:
        """The metrics, and `best`."""
        found = self.metrics(generated)
        tie = 0.0 if loss is None else 1e-6 * math.exp(-loss)  # less than any answer makes
        return found | {"best": found[self.best] + tie}
