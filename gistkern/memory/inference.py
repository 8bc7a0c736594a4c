"""Bytes of reading a context: caches, and the peak of a forward pass without gradients."""

from __future__ import annotations

from math import ceil

from gistkern.memory.parts import Parts

__all__ = ["cache_bytes", "gist_rows", "reading_bytes", "tokens_per_call"]


def cache_bytes(parts: Parts, rows: int, element: int = 2) -> int:
    """Keys and values of so many rows in every layer; a layer with a sliding window keeps no more than that."""
    kept = sum(min(rows, window or rows) for window in parts.windows)
    return 2 * kept * parts.keys * element


def gist_rows(tokens: int, gists: int, segment_length: int | None = None, sinks: int = 1) -> int:
    """Rows that a compressed context keeps: each segment's gists, and the attention sinks.

    Examples
    --------
    >>> gist_rows(6096, 10), gist_rows(6096, 8, segment_length=512)
    (11, 97)
    """
    return ceil(tokens / (segment_length or tokens)) * gists + sinks


def tokens_per_call(tokens: int, gists: int, segment_length: int | None, call_tokens: int) -> int:
    """Rows of the largest model call of `compress`: whole segments of about `call_tokens`, or all of one segment."""
    if segment_length is None or segment_length >= tokens:
        return tokens + gists
    segments = min(max(1, call_tokens // segment_length), ceil(tokens / segment_length))
    return min(segments * segment_length, tokens) + segments * gists


def reading_bytes(parts: Parts, rows: int, element: int = 2) -> int:
    """Peak of a forward pass over `rows` rows without gradients and without logits, caches aside.

    Held besides: the embedded rows, the layer's input. Then the attention's parts, or the MLP's three stages behind the
    sum with the attention's output and its norm, whichever is more.
    """
    attention = 3 * parts.hidden + 4 * parts.queries + 2 * parts.keys
    return rows * element * max(attention, 4 * parts.hidden + 3 * parts.inner)
