"""Checks that a `GistLayout` is well formed.

`check_shapes` costs nothing and runs at every construction. `check_intervals` reads the values, which on a GPU waits
for the device. So `check_once` leaves it out where it has passed before on the same, unchanged tensors, and where the
constructors made them, whose layouts hold by construction (`trusted`). `check_bounds` is the part that the op repeats
at every call on the CPU, compiled or not, however its vectors came about.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

from gistkern.layout.fields import LayoutFields
from gistkern.layout.plain import is_plain

__all__ = [
    "check_bounds",
    "check_gather",
    "check_intervals",
    "check_kept",
    "check_now",
    "check_once",
    "check_shapes",
    "is_checked",
    "state_of",
    "still_trusted",
    "trusted",
]

Layout = TypeVar("Layout", bound=LayoutFields)

_VALUES = ("gist_begin", "gist_end", "local_begin", "gather")


def check_shapes(layout: LayoutFields) -> None:
    """Raise ValueError unless shapes, dtypes and devices agree."""
    for name in ("past", "tail"):
        value = getattr(layout, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be a non-negative int, got {value!r}")
    _require(torch.is_tensor(layout.gist_begin), "gist_begin must be a tensor")
    if layout.gist_begin.dim() != 2:
        raise ValueError(f"gist_begin must be [batch, rows], got shape {tuple(layout.gist_begin.shape)}")
    batch, rows = layout.gist_begin.shape
    gathered = layout.gather.shape[-1] if torch.is_tensor(layout.gather) and layout.gather.dim() else 0
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        **dict.fromkeys(("gist_begin", "gist_end", "local_begin"), ((batch, rows), torch.int32)),
        "gather": ((batch, gathered), torch.int64),
        "is_gist": ((batch, rows), torch.bool),
        **dict.fromkeys(("stream_position", "gist_first_position"), ((batch, rows), torch.int64)),
        **dict.fromkeys(("keep_begin", "keep_end", "keep_local"), ((batch,), torch.int64)),
    }
    for name, (shape, dtype) in expected.items():
        tensor = getattr(layout, name)
        if not torch.is_tensor(tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != layout.gist_begin.device:
            raise ValueError(f"{name} is on {tensor.device}, gist_begin on {layout.gist_begin.device}: use .to(device)")
    # intervals are int32
    if max(layout.num_local, layout.num_compact) >= 2**31:
        raise ValueError(
            f"a layout has fewer than 2^31 local rows and compact rows, got {layout.num_local} and {layout.num_compact}"
        )


def check_bounds(begin: np.ndarray, end: np.ndarray, start: np.ndarray, num_compact: int, num_local: int) -> np.ndarray:
    """Raise ValueError where an interval leaves its buffer; returns each row's place among the local rows."""
    row = np.arange(num_local - begin.shape[1], num_local)
    _require(((begin >= 0) & (begin <= end)).all(), "every gist interval needs 0 <= gist_begin <= gist_end")
    _require((end <= num_compact).all(), f"gist_end must not pass the {num_compact} compact rows")
    _require(((start >= 0) & (start <= row + 1)).all(), "local_begin must lie in [0, row + 1]")
    return row


def check_gather(gather: np.ndarray, num_local: int) -> None:
    """Raise ValueError where `gather` lists what is no local row."""
    if gather.size:
        _require(
            gather.min() >= -1 and gather.max() < num_local, f"gather must list local rows 0..{num_local - 1}, or -1"
        )


def check_intervals(layout: LayoutFields) -> None:
    """Raise ValueError unless every row's two intervals obey docs/concepts/mask.md. Waits for the device."""
    check_shapes(layout)  # once more: a tensor may have been resized in place
    begin, end, start, gather = (getattr(layout, name).cpu().numpy() for name in _VALUES)
    row = check_bounds(begin, end, start, layout.num_compact, layout.num_local)
    check_gather(gather, layout.num_local)
    for name, vector in (("gist_begin", begin), ("gist_end", end), ("local_begin", start)):
        _require((vector[:, 1:] >= vector[:, :-1]).all(), f"{name} must not decrease along a row of the batch")
    _require(
        not is_plain(layout) or ((begin == end).all() and not start.any()),
        "it was made as one that hides nothing (plain), and its vectors were written since, past torch",
    )
    _require(
        ((start <= row) | (begin == end)).all(),
        "a row that does not see itself is padding and must see no gist rows either",
    )
    if gather.size:
        for sample in range(layout.batch_size):
            _check_seen_once(begin[sample], end[sample], start[sample], gather[sample], layout)


def _check_seen_once(
    begin: np.ndarray, end: np.ndarray, start: np.ndarray, gather: np.ndarray, layout: LayoutFields
) -> None:
    # the rows that see compact row c are [first[c], last[c]): both vectors are non-decreasing
    column = np.arange(layout.past, layout.num_compact)
    first, last = np.searchsorted(end, column, "right"), np.searchsorted(begin, column, "right")
    _require((gather >= 0)[first < last].all(), "a row sees an unfilled (-1) entry of gather")
    order = np.lexsort((column, gather))
    same = gather[order[1:]] == gather[order[:-1]]
    _require(
        not (same & (gather[order[1:]] >= 0) & (first[order[1:]] < last[order[:-1]])).any(),
        "a row sees one token twice among its gist rows",
    )
    seen = (first < last) & (gather >= 0)  # and of the rows that see c the first has the smallest local_begin
    _require(
        (start[first[seen]] > gather[seen]).all(),
        "a row sees one token both as a gist row and as a local row, or one that comes after it",
    )


def check_kept(layout: LayoutFields) -> None:
    """Raise ValueError unless `keep_begin`, `keep_end` and `keep_local` name rows that exist. Waits for the device."""
    begin, end, local = torch.stack([layout.keep_begin, layout.keep_end, layout.keep_local]).cpu().numpy()
    _require(
        ((begin >= 0) & (begin <= end) & (end <= layout.num_compact)).all(),
        f"keep_begin and keep_end must satisfy 0 <= keep_begin <= keep_end <= {layout.num_compact}, the compact rows",
    )
    _require(
        ((local >= 0) & (local <= layout.num_local)).all(),
        f"keep_local must lie in 0..{layout.num_local}, the local rows",
    )


def check_once(layout: LayoutFields) -> None:
    """`check_intervals`, unless these very tensors have passed. Nothing while compiling or capturing a CUDA graph."""
    if torch.compiler.is_compiling():
        return
    state = state_of(layout)
    if state is None or layout.__dict__.get("_checked") == state:
        return
    if layout.gist_begin.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    check_intervals(layout)
    layout.__dict__["_checked"] = state


def is_checked(layout: LayoutFields) -> bool:
    """Whether `check_once` would look at no value."""
    return layout.__dict__.get("_checked", 0) == state_of(layout)


def check_now(layout: LayoutFields) -> None:
    """`check_intervals`, where there are values to read."""
    if not torch.compiler.is_compiling() and state_of(layout) is not None:
        check_intervals(layout)


def trusted(layout: Layout, *sources: LayoutFields) -> Layout:
    """Remember that `layout` holds by construction: if it was made from other layouts, if those do."""
    if torch.compiler.is_compiling():
        return layout
    if not sources or all(s.__dict__.get("_checked", 0) == state_of(s) for s in sources):
        layout.__dict__["_checked"] = state_of(layout)
    return layout


def still_trusted(layout: LayoutFields, before: LayoutFields) -> None:
    """What is known of `before` holds of `layout`, which has the same vectors behind a tail of another length."""
    if (known := before.__dict__.get("_checked")) is not None:
        layout.__dict__["_checked"] = (known[0], layout.tail, *known[2:])


def state_of(layout: LayoutFields) -> tuple[Any, ...] | None:
    """What changes when the tensors do; None where there are no values to read (shapes without data)."""
    # asked at every layer: attributes only, and no loop
    begin, end, local, gather = layout.gist_begin, layout.gist_end, layout.local_begin, layout.gather
    plain = torch.Tensor
    if not (type(begin) is type(end) is type(local) is type(gather) is plain) or begin.is_meta:
        return None
    ids = (layout.past, layout.tail, begin._cdata, end._cdata, local._cdata, gather._cdata)  # as id() says
    try:
        return (*ids, begin._version, end._version, local._version, gather._version)
    except RuntimeError:  # of inference tensors, which count no versions
        return ids


def _require(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise ValueError(f"invalid GistLayout: {message}")
