"""Token streams before there is a layout: contexts cut into segments, rows of different lengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

from gistkern.layout.arguments import check_count

__all__ = ["check_segmentation", "left_padded", "segments_of"]


class _Sliceable(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /): ...


Ids = TypeVar("Ids", bound=_Sliceable)


def check_segmentation(length: int | None, overlap: int) -> None:
    """Raise ValueError unless contexts can be cut into segments of `length` (None: one segment) that overlap so."""
    if length is not None:
        check_count("segment_length", length, least=1)
    check_count("segment_overlap", overlap)
    if overlap and overlap >= (length or 0):
        raise ValueError(f"segment_overlap must be less than segment_length, got {overlap} and {length}")


def segments_of(ids: Ids, segment_length: int, segment_overlap: int = 0) -> list[Ids]:
    """The segments that `gistkern.compress` cuts a context into.

    Parameters
    ----------
    ids : Tensor, list or range
        The context's tokens, ``[N]``.
    segment_length : int
        Tokens per segment; the last may be shorter.
    segment_overlap : int
        Tokens at the start of each segment but the first that repeat the end of the one before.

    Returns
    -------
    list
        Slices of `ids`, at least one.

    Raises
    ------
    ValueError
        For lengths that `compress` refuses.

    Examples
    --------
    >>> from gistkern import segments_of
    >>> segments_of([1, 2, 3, 4, 5, 6], 3, 1)
    [[1, 2, 3], [3, 4, 5], [5, 6]]
    """
    check_segmentation(segment_length, segment_overlap)
    last = max(1, len(ids) - segment_overlap)
    return [ids[begin : begin + segment_length] for begin in range(0, last, segment_length - segment_overlap)]


def left_padded(rows: Sequence[torch.Tensor], pad_id: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Put token ids of different lengths into one batch, padded on the left, as `generate` wants its prompts.

    Parameters
    ----------
    rows : sequence of Tensor
        Token ids ``[tokens]`` each, of one dtype on one device.
    pad_id : int, optional
        Stands in front of the shorter ones; 0 if None, as of tokenizers without a padding token. The mask hides it.

    Returns
    -------
    ids : Tensor
        ``[B, N]``, like the rows.
    mask : Tensor
        bool ``[B, N]``: the real ones.

    Raises
    ------
    ValueError
        If there are no rows.

    Examples
    --------
    >>> import torch
    >>> from gistkern import left_padded
    >>> ids, mask = left_padded([torch.tensor([5, 6, 7]), torch.tensor([8])])
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[True, True, True], [False, False, True]])
    """
    if not len(rows):
        raise ValueError("no rows to pad: give at least one")
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id or 0, padding_side="left")
    count = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - count[:, None]
