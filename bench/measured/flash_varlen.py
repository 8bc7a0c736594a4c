"""flash-attn's varlen kernels over gathered gists: each segment is a sequence whose keys are its gists and its rows.

Their causal mask is aligned to the lower right corner, which is what a segment behind its gists needs.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def second(layout: GistLayout) -> Callable[..., torch.Tensor]:
    """flash-attn 2."""
    return plan(layout, importlib.import_module("flash_attn").flash_attn_varlen_func)


def third(layout: GistLayout) -> Callable[..., torch.Tensor]:
    """flash-attn 3, which is a package of its own; some versions also return the log-sum-exp."""
    varlen = importlib.import_module("flash_attn_interface").flash_attn_varlen_func

    def attend(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        found = varlen(*tensors, **options)
        return found[0] if isinstance(found, tuple) else found

    return plan(layout, attend)


def plan(layout: GistLayout, varlen: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Attention by a function with the interface of ``flash_attn_varlen_func``."""
    runs, gather = runs_of(layout), layout.gather[0].cpu()
    pieces = [
        piece
        for run in runs
        for piece in (gather[run.gist_begin : run.gist_end], torch.arange(run.local_begin, run.end))
    ]
    index = torch.cat(pieces).to(layout.device)

    def starts(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32, device=layout.device).cumsum(0, dtype=torch.int32)

    options = {
        "cu_seqlens_q": starts([run.rows for run in runs]),
        "cu_seqlens_k": starts([run.keys for run in runs]),
        "max_seqlen_q": max(run.rows for run in runs),
        "max_seqlen_k": max(run.keys for run in runs),
        "causal": True,
    }

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, keys, values = (t[0].transpose(0, 1) for t in (q, k, v))  # [N, H, D]
        return varlen(rows, keys[index], values[index], **options).transpose(0, 1)[None]

    return attend


def why_not(package: str, moves: Callable[[GistLayout, int], str]) -> Callable[[GistLayout, int], str]:
    """Why a package cannot serve a layout."""

    def reason(layout: GistLayout, heads: int) -> str:
        if layout.device.type == "cpu":
            return f"{package} needs a GPU"
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return moves(layout, heads)

    return reason
