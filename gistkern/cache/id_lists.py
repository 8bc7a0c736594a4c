"""Token ids as lists, as tokenizers return them where nobody asks for tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gistkern.layout.streams import left_padded

__all__ = ["ids_of_lists"]


def ids_of_lists(
    given: Sequence[Any], attention_mask: Any, what: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Ids of a sample or of several of any lengths, their mask, which may be lists like those, and which are real.

    `what` is what they are called in errors: TypeError for lists of anything but numbers, ValueError for other shapes.
    """
    pieces = _rows(given, f"{what} must be lists of token ids")
    if any(piece.dim() != 1 for piece in pieces) or not pieces:
        raise ValueError(f"{what} must be a list of token ids, or a list of such lists")
    ids, real = left_padded(pieces)
    if attention_mask is None:
        return ids, None, real
    if torch.is_tensor(attention_mask):
        masks = list(attention_mask) if attention_mask.dim() > 1 else [attention_mask]
    else:
        masks = _rows(attention_mask, f"attention_mask must be lists like those of {what}")
    if [mask.shape for mask in masks] != [piece.shape for piece in pieces]:
        raise ValueError(
            f"attention_mask must be like the lists of {what}, of {[len(piece) for piece in pieces]} ids, "
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
