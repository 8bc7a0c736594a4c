"""The two position schemes (docs/concepts/positions.md).

`absolute`: a token keeps its place in the stream. `gist_first`: in each segment the gists stand before the
raw tokens, and a segment starts right after the largest position among the gists that it sees, so positions
stay bounded by the visible gists plus one segment, however long the context is.
"""

from __future__ import annotations

import torch

__all__ = ["SCHEMES", "check_scheme", "gist_first", "stream"]

SCHEMES = ("absolute", "gist_first")


def check_scheme(scheme: str) -> None:
    """Raise ValueError for an unknown position scheme."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown position scheme {scheme!r}: expected one of {', '.join(SCHEMES)}")


def stream(valid: torch.Tensor) -> torch.Tensor:
    """Places among the real tokens, int64 ``[B, N]``; padding has 0."""
    return (valid.long().cumsum(1) - 1).masked_fill(~valid, 0)


def gist_first(
    is_gist: torch.Tensor,
    valid: torch.Tensor,
    starts: torch.Tensor,
    *,
    restart: bool = False,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gist-first positions of segments that see all earlier gists, int64 ``[B, N]``; padding has 0.

    `starts` marks the first row of every segment; all arguments are bool ``[B, N]``. With `restart` the
    segments see no earlier gists, so each starts at 0; with `documents` (the first row of each, bool ``[B, N]``) each
    document does.
    """
    segment = (starts.long().cumsum(1) - 1).clamp(min=0)
    gists = (is_gist & valid).long()
    raw = (~is_gist & valid).long()
    per_segment = torch.zeros_like(segment).scatter_add_(1, segment, gists)
    before = per_segment.cumsum(1) - per_segment
    raw_per_segment = torch.zeros_like(segment).scatter_add_(1, segment, raw)
    raw_before = raw_per_segment.cumsum(1) - raw_per_segment
    # a gist's place is its rank among all gists; a raw token follows its own segment's gists
    gist_place = gists.cumsum(1) - 1
    raw_place = (before + per_segment - raw_before).gather(1, segment) + raw.cumsum(1) - 1
    place = torch.where(is_gist, gist_place, raw_place)
    if restart:
        place = place - before.gather(1, segment)
    elif documents is not None:
        place = place - torch.where(documents, before.gather(1, segment), 0).cummax(1).values
    return place.masked_fill(~valid, 0)
