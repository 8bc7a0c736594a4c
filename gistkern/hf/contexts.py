"""What `compress` takes: token ids in the shapes that tokenizers give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gistkern.cache.id_lists import ids_of_lists
from gistkern.cache.offload import input_device
from gistkern.cache.reader import vocabulary_size
from gistkern.layout.arguments import check_padding

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["read_context"]


def read_context(handle: GistHandle, given: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 ``[B, N]`` and the real ones among them, bool ``[B, N]``: on the host, where the calls are planned.

    Parameters
    ----------
    handle : GistHandle
        Of the model that is to read them.
    given : Tensor, mapping or list
        Ids ``[B, N]``; what a tokenizer returns (`input_ids` and perhaps `attention_mask`; tensors, arrays or lists); a
        list of ids, or a list of such lists of any lengths.
    attention_mask : Tensor, optional
        ``[B, N]``, beside ids.

    Raises
    ------
    TypeError
        For a text, or anything else that holds no ids.
    ValueError
        For ids of a wrong shape, type or range, an empty sample, gist tokens, or two masks.
    """
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(f"the context holds no input_ids, only {sorted(given)}: pass what a tokenizer returns")
        if attention_mask is not None and given.get("attention_mask") is not None:
            raise ValueError("the context brings an attention_mask of its own: pass one of the two")
        attention_mask = given.get("attention_mask") if attention_mask is None else attention_mask
        given = given["input_ids"]
    given, attention_mask = (torch.from_numpy(t) if isinstance(t, np.ndarray) else t for t in (given, attention_mask))
    if isinstance(given, (str, bytes)) or (
        isinstance(given, Sequence) and given and isinstance(given[0], (str, bytes))
    ):
        raise TypeError("the context is a text: tokenize it first, compress(model, tokenizer(text, ...))")
    if input_device(handle.inner).type == "meta":
        raise ValueError("the model is on the meta device and has no weights to compress with: load them first")
    padded = None
    if isinstance(given, Sequence):
        ids, attention_mask, padded = ids_of_lists(given, attention_mask, "the context")
    elif torch.is_tensor(given):
        ids = given
        if isinstance(attention_mask, Sequence):
            attention_mask = torch.as_tensor(attention_mask)
    else:
        raise TypeError(f"the context must be token ids [batch, tokens], got {type(given).__name__}")
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers, got {ids.dtype}")
    ids = ids.detach().cpu().long()
    if attention_mask is not None:
        valid = check_padding(ids, attention_mask).numpy()
    else:
        valid = np.ones(ids.shape, dtype=bool) if padded is None else padded.numpy()
    _check_ids(handle, ids.numpy(), valid)
    return ids.numpy(), valid


def _check_ids(handle: GistHandle, ids: np.ndarray, valid: np.ndarray) -> None:
    if not valid.any(1).all():
        raise ValueError(f"sample {valid.any(1).argmin()} of the context is empty")
    is_gist = (ids >= handle.first_id) & (ids < handle.first_id + handle.num_ids)
    if is_gist.any():
        raise ValueError("the context holds gist tokens already: pass the raw context, compress appends them")
    size = vocabulary_size(handle.inner.get_input_embeddings(), handle.model.config)
    outside = valid & ((ids < 0) | (ids >= size))
    if outside.any():
        raise ValueError(f"the context holds the id {ids[outside][0]}, the model's vocabulary has {size} tokens")
