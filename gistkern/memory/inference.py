"""Bytes of reading a context: caches, and the peak of a forward pass without gradients."""

from __future__ import annotations

from math import ceil

from gistkern.memory.parts import Parts

__all__ = ["cache_bytes", "gist_rows", "reading_bytes", "tokens_per_call"]


def cache_bytes(parts: Parts, rows: int, element: int = 2) -> int:
    """Bytes of the keys and values of `rows` rows in all layers; one with a sliding window keeps no more than that.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> from gistkern.memory import cache_bytes, parts_of
    >>> shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    >>> parts = parts_of(LlamaConfig(**shape, num_hidden_layers=2))
    >>> cache_bytes(parts, rows=1000), cache_bytes(parts, rows=11)
    (512000, 5632)
    """
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
    """Rows of the largest model call of `compress`: whole segments of about `call_tokens`, or all of one segment.

    Examples
    --------
    >>> from gistkern.memory import tokens_per_call
    >>> tokens_per_call(100_000, 10, segment_length=512, call_tokens=4096)  # eight segments, each with its gist tokens
    4176
    """
    if segment_length is None or segment_length >= tokens:
        return tokens + gists
    segments = min(max(1, call_tokens // segment_length), ceil(tokens / segment_length))
    return min(segments * segment_length, tokens) + segments * gists


def reading_bytes(parts: Parts, rows: int, element: int = 2) -> int:
    """Peak bytes of a forward pass over `rows` rows without gradients and without logits, caches aside.

    Held besides: the embedded rows, the layer's input. Then the attention's parts, or the MLP's three stages behind the
    sum with the attention's output and its norm, whichever is more.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> from gistkern.memory import parts_of, reading_bytes
    >>> shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    >>> parts = parts_of(LlamaConfig(**shape, num_hidden_layers=2))
    >>> reading_bytes(parts, rows=4096)
    5242880
    """
    attention = 3 * parts.hidden + 4 * parts.queries + 2 * parts.keys
    return rows * element * max(attention, 4 * parts.hidden + 3 * parts.inner)
