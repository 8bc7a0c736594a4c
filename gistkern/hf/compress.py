"""`compress`: a context becomes a `GistCache`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gistkern.cache.cache import GistCache
from gistkern.cache.call_size import call_tokens
from gistkern.cache.evaluating import evaluating
from gistkern.cache.host_copy import on_device
from gistkern.cache.host_plan import (
    Call,
    Placed,
    Reading,
    place_documents,
    plan_segments,
    plan_summary,
    right_aligned,
    summarize_documents,
)
from gistkern.cache.offload import input_device
from gistkern.cache.tokens_read import ContextRead
from gistkern.cache.versions import CACHE
from gistkern.hf.contexts import read_context
from gistkern.hf.handle import GistHandle, handle_of
from gistkern.hf.keep_raw import check_raw, keeping_raw
from gistkern.layout.streams import check_segmentation, segments_of
from gistkern.rows import check_gist_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["compress", "compress_documents"]


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    input_ids: torch.Tensor | Mapping[str, Any] | Sequence[Any],
    attention_mask: torch.Tensor | None = None,
    segment_length: int | None = None,
    segment_overlap: int = 0,
    *,
    gist_dtype: torch.dtype | None = None,
    keep_raw: str | os.PathLike | None = None,
    raw_dtype: torch.dtype | None = None,
) -> GistCache:
    """Read a context and keep its gist rows only.

    Parameters
    ----------
    model : PreTrainedModel
        Patched by `gistkern.patch_llama`; a peft wrapper around it will do.
    input_ids : Tensor, mapping or list
        int64 ``[B, N]``: the context alone, the gist tokens are appended here. What a tokenizer (or its
        ``apply_chat_template``) returns will do, with the mask in it, and so will lists of ids.
    attention_mask : Tensor, optional
        ``[B, N]``; samples may differ in length, with padding left or right.
    segment_length : int, optional
        Raw tokens per segment. None compresses the context as one segment. Otherwise each segment ends in its own
        gist tokens and sees the gists of the earlier ones. Segments are read in calls of some thousand tokens, by the
        model's width and device, and then dropped, so memory holds one call however long the context is. On a
        model with ``num_segment_gist_tokens`` the segments instead write those, independently of each other, and the
        gist tokens that stay are a summary that sees all of them.
    segment_overlap : int
        Raw tokens at the start of each segment that repeat the end of the one before, so that what a boundary
        cuts is whole in one of the two. They are read, and counted, twice.
    gist_dtype : torch.dtype, optional
        What the gist rows are held in when all is read: int8 or float8_e4m3fn, as `GistCache.to` makes them of the
        model's own dtype, in which they stay by default.
    keep_raw : str or path, optional
        Keep the raw rows of each segment too, off the device, for `GistCache.restore`: ``"cpu"`` in memory, anything
        else is the path of a file that they are written to call by call.
    raw_dtype : torch.dtype, optional
        What those are held in: int8 or float8_e4m3fn, in place of the model's own dtype.

    Returns
    -------
    GistCache
        With an empty tail, ready for ``model.generate(question_ids, past_key_values=cache.clone())``.

    Raises
    ------
    ValueError
        If the model is not patched, a sample is empty, the context holds gist tokens already, or rows are not held
        in `gist_dtype` or `raw_dtype`.
    TypeError
        If the context is a text.

    Notes
    -----
    All calls of the model are planned on the host before the first one, and none waits for the device.

    Threads may compress with one model at the same time; a model in training is put to evaluation meanwhile. Gist rows
    that were never trained are warned of, once, and so are segments other than those of the training.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> context = tokenizer("The bell is with Mira. The lamp is with Jonas.", return_tensors="pt")
    >>> cache = gistkern.compress(model, context)
    >>> cache.gist_rows  # two gist tokens and one attention sink
    tensor([3])
    >>> question = tokenizer(" Who has the bell?", add_special_tokens=False, return_tensors="pt").input_ids
    >>> out = model.generate(question, past_key_values=cache.clone(), max_new_tokens=4, do_sample=False)
    >>> answer = tokenizer.decode(out[0, question.shape[1]:])
    """
    handle = handle_of(model)
    check_segmentation(segment_length, segment_overlap)
    if handle.segment_gist_token_ids and segment_length is None:
        raise ValueError("a model with num_segment_gist_tokens compresses in segments: pass segment_length")
    check_gist_dtype(gist_dtype, handle.model.dtype)
    check_raw(keep_raw, raw_dtype, handle.model.dtype)
    ids, valid = read_context(handle, input_ids, attention_mask)
    _check(handle, segment_length, segment_overlap)

    real = [sample[mask] for sample, mask in zip(ids, valid, strict=True)]
    length = segment_length or ids.shape[1]
    segments = [[segments_of(sample, length, segment_overlap)] for sample in real]
    cache = GistCache()
    cache.positions = handle.positions
    cache.written_by(handle)
    cache.contexts = {ContextRead.of(torch.from_numpy(sample)) for sample in real}
    # asked first: what looks at the weights waits for the device, and would wait for the calls
    cache.fingerprint = handle.fingerprint()
    calls = _plan(handle, segments, length)
    if keep_raw is None:
        _read(handle, cache, calls)
    else:
        contexts = list(map(ContextRead.of, map(torch.from_numpy, real)))
        with keeping_raw(handle, cache, calls, contexts, keep_raw, raw_dtype) as end_call:
            _read(handle, cache, calls, end_call)
    return cache.to(gist_dtype=gist_dtype)


@torch.no_grad()
def compress_documents(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], segment_length: int | None, segment_overlap: int
) -> tuple[GistCache, list[Placed]]:
    """Documents one behind the other as one sample, of which none sees another: every call is full, without padding.

    Parameters
    ----------
    model, segment_length, segment_overlap
        As `compress` takes them, and checks them.
    documents : sequence
        Ids of words of the model, at least one in each.

    Returns
    -------
    (GistCache, list of Placed)
        A cache of one sample, which nothing goes on from, and where each document's rows stand in it.
    """
    handle = handle_of(model)
    _check(handle, segment_length, segment_overlap)
    arrays = [np.asarray(one, dtype=np.int64) for one in documents]
    segments = [segments_of(one, segment_length or len(one), segment_overlap) for one in arrays]
    reading, gists = _reading(handle, segment_length or 1), handle.segment_gist_token_ids
    calls = plan_segments([segments], gists or handle.gist_token_ids, reading, apart=bool(gists))
    if gists:
        calls, placed = summarize_documents(calls, segments, len(gists), handle.gist_token_ids, reading)
    else:
        placed = place_documents(calls, segments, len(handle.gist_token_ids), reading)
    cache = GistCache()
    _read(handle, cache, calls)
    return cache, placed


def _check(handle: GistHandle, segment_length: int | None, segment_overlap: int) -> None:
    handle.check_settings()
    handle.warn_if_untrained(stacklevel=5)
    handle.warn_if_cut_otherwise(segment_length, segment_overlap, stacklevel=5)


def _read(handle: GistHandle, cache: GistCache, calls: list[Call], end_call: Callable[[], None] | None = None) -> None:
    """Run the calls, with `end_call` after each: a layer's raw rows go as soon as the layer is through."""
    with evaluating(handle.inner):
        for call in on_device(calls, input_device(handle.inner)):
            handle.inner(gist_plan=call, use_cache=True, **{CACHE: cache})
            if end_call is not None:
                end_call()


def _reading(handle: GistHandle, length: int) -> Reading:
    if handle.segment_gist_token_ids and handle.sink_tokens > length:
        raise ValueError(f"segment_length must be at least the {handle.sink_tokens} sink tokens, got {length}")
    device, apart = input_device(handle.inner).type, bool(handle.segment_gist_token_ids)
    tokens = call_tokens(handle.inner.config.hidden_size, device, apart)
    return Reading(handle.positions, handle.sink_tokens, handle.first_id, length, tokens)


def _plan(handle: GistHandle, samples: list[list[list[np.ndarray]]], length: int) -> list[Call]:
    """All calls: segments that see the gists of those before them, or independent ones and a summary of their gists."""
    reading = _reading(handle, length)
    if not handle.segment_gist_token_ids:
        return right_aligned(plan_segments(samples, handle.gist_token_ids, reading))
    calls = plan_segments(samples, handle.segment_gist_token_ids, reading, apart=True)
    # a raw sink stands apart from the gists; in a context shorter than sink_tokens gists are sinks as well
    sinks = np.array([min(len(sample[0][0]), handle.sink_tokens) for sample in samples])
    return plan_summary(calls, sinks, handle.gist_token_ids, reading)
