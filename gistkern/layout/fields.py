"""What a layout consists of, as the schemes compute it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

__all__ = ["LayoutFields"]


@dataclass(frozen=True, eq=False)
class LayoutFields:
    """The vectors and counts of a `GistLayout`, which documents them, and what follows from their shapes."""

    gist_begin: torch.Tensor
    gist_end: torch.Tensor
    local_begin: torch.Tensor
    gather: torch.Tensor
    is_gist: torch.Tensor
    stream_position: torch.Tensor
    gist_first_position: torch.Tensor
    keep_begin: torch.Tensor
    keep_end: torch.Tensor
    keep_local: torch.Tensor
    past: int = 0
    tail: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have the fields alone: what was found out of these tensors need not hold of others."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def batch_size(self) -> int:
        """B: samples."""
        return self.gist_begin.shape[0]

    @property
    def num_rows(self) -> int:
        """N: query rows of the call."""
        return self.gist_begin.shape[1]

    @property
    def num_local(self) -> int:
        """M: local key rows, ``tail + N``."""
        return self.tail + self.num_rows

    @property
    def num_compact(self) -> int:
        """G: compact key rows, ``past`` plus gathered."""
        return self.past + self.gather.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the layout's tensors are."""
        return self.gist_begin.device

    def row_index(self) -> torch.Tensor:
        """Local row of every query row, int32 ``[N]``."""
        return torch.arange(self.tail, self.num_local, dtype=torch.int32, device=self.device)

    def is_real(self) -> torch.Tensor:
        """bool ``[B, N]``: rows that are not padding (a real row always sees itself)."""
        return self.local_begin <= self.row_index()

    def on(self, device: torch.device | str) -> LayoutFields:
        """The same fields with their tensors on `device`."""
        mine: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) if torch.is_tensor(v) else v for n, v in mine.items()}
        return type(self)(**moved)
