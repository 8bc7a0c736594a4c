"""What `compress` takes: token ids in the shapes that tokenizers give them, and a model that is put to evaluation."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from gistkern.cache.fingerprint import named_modules
from gistkern.cache.offload import input_device
from gistkern.hf.embedding import vocabulary_size
from gistkern.layout.arguments import check_padding
from gistkern.layout.streams import left_padded

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["evaluating", "read_context"]


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
        ids, attention_mask, padded = _of_lists(given, attention_mask)
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


def _of_lists(given: Sequence[Any], attention_mask: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Ids of a sample or of several of any lengths, their mask, which may be lists like those, and which are real."""
    pieces = _rows(given, "the context must be lists of token ids")
    if any(piece.dim() != 1 for piece in pieces) or not pieces:
        raise ValueError("the context must be a list of token ids, or a list of such lists")
    ids, real = left_padded(pieces)
    if attention_mask is None:
        return ids, None, real
    if torch.is_tensor(attention_mask):
        masks = list(attention_mask) if attention_mask.dim() > 1 else [attention_mask]
    else:
        masks = _rows(attention_mask, "attention_mask must be lists like those of the context")
    if [mask.shape for mask in masks] != [piece.shape for piece in pieces]:
        raise ValueError(
            f"attention_mask must be like the context's lists of {[len(piece) for piece in pieces]} ids, "
            f"got {[tuple(mask.shape) for mask in masks]}"
        )
    return ids, left_padded([mask.cpu() for mask in masks])[0], real


def _rows(given: Any, wanted: str) -> list[torch.Tensor]:
    """A list of numbers, or a list of such lists, as one tensor for each row."""
    try:
        one = not len(given) or not isinstance(given[0], (Sequence, np.ndarray, torch.Tensor))
        return [torch.as_tensor(row, device="cpu") for row in ([given] if one and len(given) else given)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}: {error}") from error


_lock = threading.Lock()
# of each model: how many threads evaluate it now, and the modules that train otherwise
_inside: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no part of the model is in training mode. The last thread to leave puts back what the first found."""
    with _lock:
        count, training = _inside.get(model) or (0, [module for _, module in named_modules(model) if module.training])
        _inside[model] = count + 1, training
        for module in training:
            module.training = False
    try:
        yield
    finally:
        with _lock:
            count, training = _inside.pop(model)
            if count > 1:
                _inside[model] = count - 1, training
            else:
                for module in training:
                    module.training = True
