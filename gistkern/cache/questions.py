"""What `GistCache.restore` takes as questions: token ids in the shapes that tokenizers give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gistkern.cache.id_lists import ids_of_lists
from gistkern.cache.offload import input_device
from gistkern.cache.reader import vocabulary_size
from gistkern.layout.arguments import check_padding

__all__ = ["read_questions"]

_WANTED = "the questions must be token ids [batch, tokens], or a list of ids for each"

_EMPTY = "a question is empty: there is nothing to restore for"


def read_questions(handle: Any, given: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 ``[B, N]``, 0 in place of padding, and the real ones among them (bool), on the model's device.

    Parameters
    ----------
    handle : GistHandle
        Of the model that reads them.
    given, mask
        As `restore` takes them. TypeError for a text or anything else that holds no ids; ValueError for ids of a wrong
        shape, type or range, an empty question, gist tokens, or two masks.
    """
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(f"the questions hold no input_ids, only {sorted(given)}: pass what a tokenizer returns")
        if mask is not None and given.get("attention_mask") is not None:
            raise ValueError("the questions bring an attention_mask of their own: pass one of the two")
        given, mask = given["input_ids"], given.get("attention_mask") if mask is None else mask
    given, mask = (torch.from_numpy(t) if isinstance(t, np.ndarray) else t for t in (given, mask))
    real = None
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        if any(isinstance(one, str | bytes) for one in given):
            raise TypeError(f"{_WANTED}, got texts")
        if not given or any(isinstance(one, Sequence) and not one for one in given):
            raise ValueError(_EMPTY)
        given, mask, real = ids_of_lists(given, mask, "the questions")
    if not torch.is_tensor(given):
        raise TypeError(f"{_WANTED}, got {type(given).__name__}")
    if given.dim() != 2 or not given.numel() or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            f"the questions must be integers [batch, tokens] with at least one token, got {given.dtype} of shape "
            f"{tuple(given.shape)}"
        )
    ids = given.to(input_device(handle.inner), torch.int64)
    if mask is not None:
        mask = torch.as_tensor(mask).to(ids.device)
        real = check_padding(ids, mask) if real is None else check_padding(ids, mask) & real.to(ids.device)
    elif real is None:
        real = torch.ones_like(ids, dtype=torch.bool)
    real = real.to(ids.device)
    if not bool(real.any(1).all()):
        raise ValueError(_EMPTY)
    ids = ids.masked_fill(~real, 0)
    if bool((handle.is_gist(ids) & real).any()):
        raise ValueError("a question holds gist tokens: pass its words alone")
    size = vocabulary_size(handle.inner.get_input_embeddings(), handle.model.config)
    outside = (ids < 0) | (ids >= size)
    if bool(outside.any()):
        raise ValueError(f"a question holds the id {int(ids[outside][0])}, the model's vocabulary has {size} tokens")
    return ids, real
