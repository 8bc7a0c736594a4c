"""Checks that a `GistLayout` is well formed.

`check_shapes` costs nothing and runs at every construction. `check_intervals` reads the values, which on a
GPU waits for the device, so the constructors, whose layouts hold by construction, leave it to the tests
and to users who fill the vectors by hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from gistkern.layout import GistLayout

__all__ = ["check_intervals", "check_shapes"]


def check_shapes(layout: GistLayout) -> None:
    """Raise ValueError unless shapes, dtypes and devices agree."""
    for name in ("past", "tail"):
        value = getattr(layout, name)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a non-negative int, got {value!r}")
    if layout.gist_begin.dim() != 2:
        raise ValueError(f"gist_begin must be [batch, rows], got shape {tuple(layout.gist_begin.shape)}")
    batch, rows = layout.gist_begin.shape
    expected = {
        **dict.fromkeys(("gist_begin", "gist_end", "local_begin"), ((batch, rows), torch.int32)),
        "gather": ((batch, layout.gather.shape[-1]), torch.int64),
        "is_gist": ((batch, rows), torch.bool),
        **dict.fromkeys(("stream_position", "gist_first_position"), ((batch, rows), torch.int64)),
        **dict.fromkeys(("keep_begin", "keep_end", "keep_local"), ((batch,), torch.int64)),
    }
    for name, (shape, dtype) in expected.items():
        tensor = getattr(layout, name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != layout.gist_begin.device:
            raise ValueError(f"{name} is on {tensor.device}, gist_begin on {layout.gist_begin.device}: use .to(device)")


def check_intervals(layout: GistLayout) -> None:
    """Raise ValueError unless every row's two intervals obey docs/mask.md. Waits for the device."""
    begin, end, start = (
        t.cpu().numpy().astype(np.int64) for t in (layout.gist_begin, layout.gist_end, layout.local_begin)
    )
    gather = layout.gather.cpu().numpy()
    row = np.arange(layout.tail, layout.num_local)
    for name, vector in (("gist_begin", begin), ("gist_end", end), ("local_begin", start)):
        _require((np.diff(vector, axis=1) >= 0).all(), f"{name} must not decrease along a row of the batch")
    _require(((begin >= 0) & (begin <= end)).all(), "every gist interval needs 0 <= gist_begin <= gist_end")
    _require((end <= layout.num_compact).all(), f"gist_end must not pass the {layout.num_compact} compact rows")
    _require(((start >= 0) & (start <= row + 1)).all(), "local_begin must lie in [0, row + 1]")
    _require(
        ((start <= row) | (begin == end)).all(),
        "a row that does not see itself is padding and must see no gist rows either",
    )
    _require((gather < layout.num_local).all() and (gather >= -1).all(), "gather must list local rows, or -1")
    for sample in range(layout.batch_size):
        _check_seen_once(begin[sample], end[sample], start[sample], gather[sample], layout.past)


def _check_seen_once(begin: np.ndarray, end: np.ndarray, start: np.ndarray, gather: np.ndarray, past: int) -> None:
    # rows with equal gist intervals are checked once, at their smallest local_begin
    keys, which = np.unique(np.stack([begin, end], 1), axis=0, return_inverse=True)
    for index, (first, last) in enumerate(keys):
        seen = gather[max(first - past, 0) : max(last - past, 0)]
        if first == last or not seen.size:
            continue
        _require((seen >= 0).all(), "a row sees an unfilled (-1) entry of gather")
        _require(np.unique(seen).size == seen.size, "a row sees one token twice among its gist rows")
        _require(
            seen.max() < start[which.ravel() == index].min(),
            "a row sees one token both as a gist row and as a local row",
        )


def _require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise ValueError(f"invalid GistLayout: {message}")
