"""`ignore_gist_labels`: a collator whose batches label no gist token, so that any Trainer counts what it trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gistkern.training.streams import IGNORED

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["ignore_gist_labels"]


def ignore_gist_labels(collator: Callable[..., Any], handle: GistHandle) -> Callable[..., Any]:
    """The same collator, with -100 instead of gist tokens in its labels.

    A gist token is never predicted, so a patched model ignores such labels. A Trainer counts the labels before the
    model sees them, to divide the loss by their number: it has to be told in the batch. `GistDataCollator` labels
    answers only and needs no wrapping; other collators (transformers', TRL's, your own) do where the labels are a copy
    of the ids.

    Parameters
    ----------
    collator : callable
        Makes batches with `labels`, `shift_labels`, or neither (tensors or numpy arrays). Its attributes are read
        through the wrapper. It can be pickled if the collator can: data workers copy it, and no model with it.
    handle : GistHandle
        What `gistkern.patch_llama` returned.

    Raises
    ------
    TypeError
        If the collator is none, or when called, for labels that are no tensors.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator
    >>> from gistkern.training import ignore_gist_labels
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...                                      num_attention_heads=2, vocab_size=100))
    >>> collate = ignore_gist_labels(default_data_collator, patch_llama(model, num_gist_tokens=2))
    >>> row = [5, 6, 100, 101, 7]
    >>> collate([{"input_ids": row, "labels": row}])["labels"]
    tensor([[   5,    6, -100, -100,    7]])
    """
    if not callable(collator):
        raise TypeError(f"collator must be a function of a list of features, got {type(collator).__name__}")
    return _Ignoring(collator, handle.first_id, handle.num_ids)


class _Ignoring:
    def __init__(self, collator: Callable[..., Any], first: int, count: int) -> None:
        self.collator = collator
        self.first, self.count = first, count

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collator(*args, **kwargs)
        for name in ("labels", "shift_labels"):
            labels = batch.get(name)
            if labels is not None:
                batch[name] = self._ignored(name, labels)
        return batch

    def _ignored(self, name: str, labels: Any) -> Any:
        if not isinstance(labels, (torch.Tensor, np.ndarray)):
            raise TypeError(f"{name} of a batch must be a tensor or an array, got {type(labels).__name__}")
        gists: Any = (labels >= self.first) & (labels < self.first + self.count)
        return (torch if isinstance(labels, torch.Tensor) else np).where(gists, IGNORED, labels)

    def __getattr__(self, name: str) -> Any:
        # a Trainer asks its collator for its tokenizer; copying asks for special names before there is a collator
        if name.startswith("__") or name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __repr__(self) -> str:
        return f"ignore_gist_labels({self.collator!r})"
