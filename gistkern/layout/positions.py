"""The two position schemes (docs/concepts/positions.md).

`absolute`: a token keeps its place in the stream. `gist_first`: in each segment the gists stand before the
raw tokens, and a segment starts right after the largest position among the gists that it sees, so positions
stay bounded by the visible gists plus one segment, however long the context is.
"""

from __future__ import annotations

from gistkern.layout import arrays

__all__ = ["SCHEMES", "check_scheme", "gist_first", "stream"]

SCHEMES = ("absolute", "gist_first")


def check_scheme(scheme: str) -> None:
    """Raise ValueError for an unknown position scheme."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown position scheme {scheme!r}: expected one of {', '.join(SCHEMES)}")


def stream(valid: arrays.Vectors) -> arrays.Vectors:
    """Places among the real tokens, int64 ``[B, N]``; padding has 0."""
    return arrays.where(valid, arrays.int64(valid).cumsum(1) - 1, 0)


def gist_first(
    is_gist: arrays.Vectors,
    valid: arrays.Vectors,
    starts: arrays.Vectors,
    *,
    restart: bool = False,
    documents: arrays.Vectors | None = None,
) -> arrays.Vectors:
    """Gist-first positions of segments that see all earlier gists, int64 ``[B, N]``; padding has 0.

    `starts` marks the first row of every segment; all arguments are bool ``[B, N]``. With `restart` the
    segments see no earlier gists, so each starts at 0; with `documents` (the first row of each, bool ``[B, N]``) each
    document does.
    """
    segment = arrays.int64(starts).cumsum(1) - 1
    segment = arrays.where(segment < 0, 0, segment)  # of padding in front
    gists = arrays.int64(is_gist & valid)
    raw = arrays.int64(~is_gist & valid)
    per_segment = arrays.added_up(segment, gists)
    before = per_segment.cumsum(1) - per_segment
    raw_per_segment = arrays.added_up(segment, raw)
    raw_before = raw_per_segment.cumsum(1) - raw_per_segment
    # a gist's place is its rank among all gists; a raw token follows its own segment's gists
    gist_place = gists.cumsum(1) - 1
    raw_place = arrays.taken(before + per_segment - raw_before, segment) + raw.cumsum(1) - 1
    place = arrays.where(is_gist, gist_place, raw_place)
    if restart:
        place = place - arrays.taken(before, segment)
    elif documents is not None:
        place = place - arrays.running_max(arrays.where(documents, arrays.taken(before, segment), 0))
    return arrays.where(valid, place, 0)
