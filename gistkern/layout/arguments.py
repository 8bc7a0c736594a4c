"""Checks of what callers pass: counts, lists of lengths, token ids, padding masks."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

__all__ = ["check_count", "check_padding", "check_segments", "counts_of", "ints", "token_ids"]


def check_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The padding mask as bool ``[B, N]``; ValueError if its shape differs or padding stands inside."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be [batch, tokens] like input_ids {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    valid = attention_mask.to(input_ids.device) != 0
    if attention_mask.is_floating_point() and attention_mask.isnan().any():
        raise ValueError("attention_mask holds NaN: it must be nonzero for real tokens and 0 for padding")
    edges = (valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0]
    if (edges > 1).any():
        raise ValueError(
            f"attention_mask of sample {int(edges.argmax())} has padding between real tokens: "
            "padding may stand left and right of a sample's tokens only"
        )
    return valid


def check_count(name: str, value: int, least: int = 0) -> None:
    """Raise ValueError unless `value` is an int of at least `least`, and fits an int32 as intervals do."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    if value >= 2**31:
        raise ValueError(f"{name} must be less than 2^31, got {value}")


def counts_of(name: str, value: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Counts of samples as int64 ``[B]`` on `device`."""
    wrong = value.dim() != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    if wrong or not len(value) or bool(((value < 0) | (value >= 2**31)).any()):
        raise ValueError(f"{name} must be an int, or non-negative ints below 2^31, one for each sample, got {value!r}")
    return value.to(device, torch.int64)


def token_ids(ids: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Token ids as int64 on `device`; ValueError unless they are a non-empty list."""
    try:
        ids = torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"gist_token_ids must be a non-empty list of token ids, got {ids!r}") from error
    if ids.dim() != 1 or not len(ids) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gist_token_ids must be a non-empty list of token ids, got {ids.tolist()!r}")
    return ids.long()


def ints(name: str, values: Sequence[int]) -> list[int]:
    """A list of ints, also of numpy and torch integers; ValueError where it is none."""
    try:
        return [value if isinstance(value, bool) else operator.index(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a list of ints, got {values!r}") from error


def check_segments(lengths: Sequence[int], counts: Sequence[int]) -> None:
    """Raise ValueError unless every segment has raw tokens and gist tokens, and all fit an int32."""
    for name, values in (("raw tokens", lengths), ("gist tokens", counts)):
        for i, value in enumerate(values):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"segment {i} has {value!r} {name}: every segment needs an int of at least 1")
    if sum(lengths) + sum(counts) >= 2**31:
        raise ValueError("the segments have 2^31 tokens or more: a layout has fewer")
