"""Vectors of a batch, as torch tensors or as numpy arrays: what the two spell differently.

Who knows the roles of tokens on the host (`gistkern.compress` does) gets layouts from numpy, which asks no device and
is no operation of torch's; all others from tensors, where these are. The rule is written once for both.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

__all__ = [
    "Vectors",
    "added_up",
    "filled",
    "int32",
    "int64",
    "largest",
    "order_of",
    "places",
    "running_max",
    "shifted",
    "taken",
    "where",
]

Vectors: TypeAlias = Any  # a Tensor or an array, [B, N]; a function returns what it was given


def places(count: int, like: Vectors) -> Vectors:
    """int64 ``[count]``: 0, 1, 2, ..."""
    return np.arange(count) if isinstance(like, np.ndarray) else torch.arange(count, device=like.device)


def filled(count: int, value: int, like: Vectors) -> Vectors:
    """int64 ``[count]``, all `value`."""
    return np.full(count, value) if isinstance(like, np.ndarray) else torch.full((count,), value, device=like.device)


def where(condition: Vectors, one: Any, other: Any) -> Vectors:
    """`one` where the condition holds, `other` elsewhere."""
    return (np if isinstance(condition, np.ndarray) else torch).where(condition, one, other)


def int64(vectors: Vectors) -> Vectors:
    """The same values as int64."""
    return vectors.astype(np.int64) if isinstance(vectors, np.ndarray) else vectors.long()


def int32(vectors: Vectors) -> Vectors:
    """The same values as int32."""
    return vectors.astype(np.int32) if isinstance(vectors, np.ndarray) else vectors.int()


def shifted(vectors: Vectors) -> Vectors:
    """Each row one place to the right, with a zero in front."""
    if isinstance(vectors, np.ndarray):
        moved = np.zeros_like(vectors)
        moved[:, 1:] = vectors[:, :-1]
        return moved
    return torch.nn.functional.pad(vectors[:, :-1], (1, 0))


def running_max(vectors: Vectors) -> Vectors:
    """The largest value of each row so far."""
    return np.maximum.accumulate(vectors, 1) if isinstance(vectors, np.ndarray) else vectors.cummax(1).values


def largest(vectors: Vectors) -> Vectors:
    """``[B, 1]``: the largest value of each row."""
    return vectors.max(1, keepdims=True) if isinstance(vectors, np.ndarray) else vectors.amax(1, keepdim=True)


def taken(vectors: Vectors, index: Vectors) -> Vectors:
    """Of each row the values at `index`, int64 ``[B, K]``."""
    return np.take_along_axis(vectors, index, 1) if isinstance(vectors, np.ndarray) else vectors.gather(1, index)


def added_up(index: Vectors, amounts: Vectors) -> Vectors:
    """int64 ``[B, N]``: at each place of a row the sum of the amounts whose index it is."""
    if not isinstance(index, np.ndarray):
        return torch.zeros_like(index).scatter_add_(1, index, amounts)
    batch, rows = index.shape
    flat = (index + rows * np.arange(batch)[:, None]).ravel()
    return np.bincount(flat, amounts.ravel(), batch * rows).astype(np.int64).reshape(batch, rows)


def order_of(marked: Vectors) -> Vectors:
    """int64 ``[B, N]``: the places of each row's true entries, in order, then those of the others."""
    if isinstance(marked, np.ndarray):
        return np.argsort(~marked, axis=1, kind="stable")
    return torch.argsort(~marked, dim=1, stable=True)
