"""Layouts put together: `pack` along the rows (varlen documents), `stack` along the batch (ragged samples)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gistkern.layout.fields import LayoutFields
from gistkern.layout.plain import is_plain, marked

__all__ = ["pack", "stack"]


def pack(layouts: Sequence[LayoutFields]) -> LayoutFields:
    """See `GistLayout.pack`."""
    _check(layouts, "pack", same_batch=True)
    for name in ("num_local", "num_compact"):
        if sum(getattr(layout, name) for layout in layouts) >= 2**31:
            raise ValueError(f"pack makes a layout of fewer than 2^31 rows ({name})")
    compact_offset = local_offset = 0
    parts: dict[str, list[torch.Tensor]] = {}
    for layout in layouts:
        filled = torch.where(layout.gather >= 0, layout.gather + local_offset, -1)
        shifted = {
            "gist_begin": layout.gist_begin + compact_offset,
            "gist_end": layout.gist_end + compact_offset,
            "local_begin": layout.local_begin + local_offset,
            "gather": filled,
        }
        for name in ("is_gist", "stream_position", "gist_first_position"):
            shifted[name] = getattr(layout, name)
        for name, tensor in shifted.items():
            parts.setdefault(name, []).append(tensor)
        # what may be seen after the pack belongs to the last document
        keep_begin, keep_end = layout.keep_begin + compact_offset, layout.keep_end + compact_offset
        keep_local = layout.keep_local + local_offset
        compact_offset += layout.num_compact
        local_offset += layout.num_rows
    joined: dict[str, Any] = {name: torch.cat(tensors, 1) for name, tensors in parts.items()}
    fields = LayoutFields(**joined, keep_begin=keep_begin, keep_end=keep_end, keep_local=keep_local)
    return marked(fields, len(layouts) == 1 and is_plain(layouts[0]))


def stack(layouts: Sequence[LayoutFields], padding_side: str) -> LayoutFields:
    """See `GistLayout.stack`."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    _check(layouts, "stack", same_batch=False)
    rows = max(layout.num_rows for layout in layouts)
    width = max(layout.gather.shape[1] for layout in layouts)
    padded = [_padded(layout, rows, width, padding_side) for layout in layouts]
    joined: dict[str, Any] = {name: torch.cat([p[name] for p in padded]) for name in padded[0]}
    unpadded = all(layout.num_rows == rows for layout in layouts)
    return marked(LayoutFields(**joined), unpadded and all(map(is_plain, layouts)))


def _padded(layout: LayoutFields, rows: int, width: int, side: str) -> dict[str, torch.Tensor]:
    missing = rows - layout.num_rows
    left = side == "left"
    pad = (missing, 0) if left else (0, missing)
    shift = missing if left else 0
    index = torch.arange(rows, dtype=torch.int32, device=layout.device)
    is_padding = index < missing if left else index >= layout.num_rows
    gather = torch.where(layout.gather >= 0, layout.gather + shift, -1)

    def fill(tensor: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
        return torch.where(is_padding, value, torch.nn.functional.pad(tensor, pad))

    # padding sees nothing, at places that keep the vectors monotone
    edge = 0 if left else layout.gist_end[:, -1:]
    return {
        "gist_begin": fill(layout.gist_begin, edge),
        "gist_end": fill(layout.gist_end, edge),
        "local_begin": fill(layout.local_begin + shift, index + 1),
        "gather": torch.nn.functional.pad(gather, (0, width - gather.shape[1]), value=-1),
        "is_gist": torch.nn.functional.pad(layout.is_gist, pad),
        "stream_position": fill(layout.stream_position, 0),
        "gist_first_position": fill(layout.gist_first_position, 0),
        "keep_begin": layout.keep_begin,
        "keep_end": layout.keep_end,
        # an empty tail stays empty: it starts after the last row, padding included
        "keep_local": torch.where(layout.keep_local < layout.num_rows, layout.keep_local + shift, rows),
    }


def _check(layouts: Sequence[LayoutFields], verb: str, same_batch: bool) -> None:
    if not layouts:
        raise ValueError(f"nothing to {verb}: the list of layouts is empty")
    if wrong := [layout for layout in layouts if not isinstance(layout, LayoutFields)]:
        raise TypeError(f"{verb} takes GistLayouts, got {type(wrong[0]).__name__}")
    if any(layout.past or layout.tail for layout in layouts):
        raise ValueError(f"{verb} takes layouts without past and tail rows")
    if len({layout.device for layout in layouts}) > 1:
        raise ValueError(f"{verb} takes layouts on one device")
    if same_batch and len({layout.batch_size for layout in layouts}) > 1:
        raise ValueError(f"{verb} takes layouts of one batch size")
