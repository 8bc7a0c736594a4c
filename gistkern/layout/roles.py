"""Roles of tokens: marked from the lengths of segments, and listed as compact rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gistkern.layout import arrays

__all__ = ["gather_list", "roles_of_segments"]


def gather_list(persistent: arrays.Vectors, flag: arrays.Vectors | None = None) -> tuple[arrays.Vectors, bool]:
    """Positions of the true entries of each row in order, padded with -1 to the longest; and `flag` on the host.

    Of tensors, or of numpy arrays.
    """
    count = persistent.sum(1)
    both = count.max() if len(count) else count.sum()
    # the one host sync of a batch: both in one number
    both = both * 2 if flag is None else both * 2 + flag
    width, found = divmod(int(both), 2)
    order = arrays.order_of(persistent)[:, :width]
    return arrays.where(arrays.places(width, persistent) < count[:, None], order, -1), bool(found)


def roles_of_segments(lengths: Sequence[int], counts: Sequence[int], tail: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(is_gist, starts) of segments followed by raw tail rows, bool ``[1, N]`` each."""
    rows = sum(lengths) + sum(counts) + tail
    is_gist = torch.zeros(1, rows, dtype=torch.bool)
    starts = torch.zeros(1, rows, dtype=torch.bool)
    at = 0
    for length, count in zip(lengths, counts, strict=True):
        starts[0, at] = True
        is_gist[0, at + length : at + length + count] = True
        at += length + count
    if tail:
        starts[0, at] = True
    return is_gist, starts
