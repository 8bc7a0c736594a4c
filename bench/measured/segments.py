"""Runs of rows that see the same: what per-segment baselines loop over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gistkern import GistLayout


@dataclass(frozen=True)
class Run:
    """Rows ``[begin, end)``, which see compact rows ``[gist_begin, gist_end)`` and their own from `local_begin` on."""

    begin: int
    end: int
    gist_begin: int
    gist_end: int
    local_begin: int

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.end - self.begin

    @property
    def keys(self) -> int:
        """Keys that the last row sees."""
        return self.gist_end - self.gist_begin + self.end - self.local_begin


def runs_of(layout: GistLayout) -> list[Run]:
    """The runs of a layout of one batch row; ValueError if it has more, or rows of earlier calls."""
    if layout.batch_size != 1 or layout.past or layout.tail:
        raise ValueError("baselines take layouts of one batch row without rows of earlier calls")
    vectors = torch.cat([layout.gist_begin, layout.gist_end, layout.local_begin])
    changes = (vectors[:, 1:] != vectors[:, :-1]).any(0).nonzero().flatten() + 1
    begins = [0, *changes.tolist()]
    seen = vectors[:, begins].T.tolist()
    ends = [*begins[1:], layout.num_rows]
    return [Run(begin, end, *row) for begin, end, row in zip(begins, ends, seen, strict=True)]
