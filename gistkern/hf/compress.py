"""`compress`: a context becomes a `GistCache`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gistkern.cache.cache import GistCache
from gistkern.cache.plan import CacheState, plan_call
from gistkern.cache.tokens_read import ContextRead, TokensRead
from gistkern.cache.versions import CACHE
from gistkern.hf.contexts import evaluating, read_context
from gistkern.hf.handle import GistHandle, handle_of
from gistkern.layout import GistLayout, positions
from gistkern.layout.layout import layout_of
from gistkern.layout.schemes import from_roles
from gistkern.layout.streams import check_segmentation, left_padded, segments_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["compress"]

# raw tokens per model call of a compression in segments: enough to fill the machine, small beside a context
CALL_TOKENS = 4096
# the same on a CPU for segments that see each other's gists: 4,096 gained a tenth and took seven times the memory
CPU_CALL_TOKENS = 512


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    input_ids: torch.Tensor | Mapping[str, Any] | Sequence[Any],
    attention_mask: torch.Tensor | None = None,
    segment_length: int | None = None,
    segment_overlap: int = 0,
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
        gist tokens and sees the gists of the earlier ones. Segments are read in calls of about `CALL_TOKENS`
        (on a CPU `CPU_CALL_TOKENS`) and then dropped, so memory holds one call however long the context is. On a
        model with ``num_segment_gist_tokens`` the segments instead write those, independently of each other, and the
        gist tokens that stay are a summary that sees all of them.
    segment_overlap : int
        Raw tokens at the start of each segment that repeat the end of the one before, so that what a boundary
        cuts is whole in one of the two. They are read, and counted, twice.

    Returns
    -------
    GistCache
        With an empty tail, ready for ``model.generate(question_ids, past_key_values=cache.clone())``.

    Raises
    ------
    ValueError
        If the model is not patched, a sample is empty, or the context holds gist tokens already.
    TypeError
        If the context is a text.

    Notes
    -----
    Threads may compress with one model at the same time; a model in training is put to evaluation meanwhile. Gist rows
    that were never trained are warned of, once.
    """
    handle = handle_of(model)
    check_segmentation(segment_length, segment_overlap)
    if handle.segment_gist_token_ids and segment_length is None:
        raise ValueError("a model with num_segment_gist_tokens compresses in segments: pass segment_length")
    ids, valid = read_context(handle, input_ids, attention_mask)
    handle.check_settings()
    handle.warn_if_untrained()

    cache = GistCache()
    length = segment_length or ids.shape[1]
    real = [sample[mask] for sample, mask in zip(ids, valid, strict=True)]
    samples = [segments_of(sample, length, segment_overlap) for sample in real]
    scheme = _hierarchical if handle.segment_gist_token_ids else _segment_wise
    with evaluating(handle.inner):
        scheme(handle, cache, samples, length)
    cache.state, cache.read = replace(_state(cache, ids), fed=0), TokensRead()
    cache.contexts = {ContextRead.of(sample.cpu()) for sample in real}
    cache.fingerprint = handle.fingerprint()
    return cache


def _segment_wise(handle: GistHandle, cache: GistCache, samples: list[list[torch.Tensor]], length: int) -> None:
    """Segments that see the gists of all before them, many per call; samples that have ended bring padding only."""
    first = samples[0][0]
    tokens = CPU_CALL_TOKENS if first.device.type == "cpu" else CALL_TOKENS
    for pieces in _calls(samples, first.new_tensor(handle.gist_token_ids), tokens // length):
        ids, valid = left_padded(pieces)
        plan = plan_call(
            _state(cache, ids),
            handle.is_gist(ids) & valid,
            valid,
            scheme=handle.positions,
            sink_tokens=handle.sink_tokens,
        )
        _run(handle, cache, ids, valid, plan.layout.closed(), plan.position_ids)


def _calls(samples: list[list[torch.Tensor]], gists: torch.Tensor, step: int) -> Iterator[list[torch.Tensor]]:
    """The tokens of each call, by sample: `step` segments (at least one), each with its gists behind it."""
    step = max(1, step)
    for first in range(0, max(len(segments) for segments in samples), step):
        yield [
            torch.cat([gists[:0], *(part for segment in segments[first : first + step] for part in (segment, gists))])
            for segments in samples
        ]


def _hierarchical(handle: GistHandle, cache: GistCache, samples: list[list[torch.Tensor]], length: int) -> None:
    """Independent segments, many per call, then one call of summary gists that sees all segment gists."""
    if handle.sink_tokens > length:
        raise ValueError(f"segment_length must be at least the {handle.sink_tokens} sink tokens, got {length}")
    ends = samples[0][0].new_tensor(handle.segment_gist_token_ids)
    for pieces in _calls(samples, ends, CALL_TOKENS // length):
        _run_independent(handle, cache, *left_padded(pieces))
    # a raw sink stands apart from the gists; in a context shorter than sink_tokens gists are sinks as well
    sinks = ends.new_tensor([min(len(segments[0]), handle.sink_tokens) for segments in samples])
    _sinks_last(cache, _state(cache, ends), sinks)
    _run_summary(handle, cache, ends.new_tensor(handle.gist_token_ids), sinks)


def _run_independent(handle: GistHandle, cache: GistCache, ids: torch.Tensor, valid: torch.Tensor) -> None:
    state = _state(cache, ids)
    layout = layout_of(
        from_roles(
            handle.is_gist(ids),
            valid,
            sink_tokens=handle.sink_tokens,
            past=state.gist_columns,
            past_rows=state.gist_rows,
            seen=state.seen,
        )
    )
    starts = valid & (layout.local_begin == layout.row_index())
    layout = replace(
        layout.closed(),
        gist_end=layout.gist_begin,  # an empty interval: no segment sees another
        gist_first_position=positions.gist_first(layout.is_gist, valid, starts, restart=True),
    )
    place = layout.positions(handle.positions)
    if handle.positions == "absolute":
        place = place + state.seen[:, None]
    _run(handle, cache, ids, valid, layout, place)


def _run_summary(handle: GistHandle, cache: GistCache, summary: torch.Tensor, sinks: torch.Tensor) -> None:
    state = _state(cache, sinks)
    ids = summary.expand(len(sinks), -1)
    valid = torch.ones_like(ids, dtype=torch.bool)
    layout = layout_of(from_roles(valid, valid, sink_tokens=0, past=state.gist_columns, past_rows=state.gist_rows))
    layout = replace(layout.closed(), keep_begin=state.gist_columns - sinks)
    place = layout.positions(handle.positions) + state.tail_position[:, None]
    _run(handle, cache, ids, valid, layout, place)


def _sinks_last(cache: GistCache, state: CacheState, sinks: torch.Tensor) -> None:
    """Move each sample's `sinks` sink rows behind its gist rows, next to the summary that stays with them."""
    column = torch.arange(state.gist_columns, device=state.seen.device)
    first = (state.gist_columns - state.gist_rows)[:, None]
    source = torch.where(column >= first, first + (column - first + sinks[:, None]) % state.gist_rows[:, None], column)
    cache.take_gists(source)


def _run(
    handle: GistHandle,
    cache: GistCache,
    ids: torch.Tensor,
    valid: torch.Tensor,
    layout: GistLayout,
    position_ids: torch.Tensor,
) -> None:
    """One call of the inner model; each layer's raw rows go as soon as the layer is through."""
    handle.inner(
        input_ids=ids,
        attention_mask=valid,
        position_ids=position_ids.masked_fill(~valid, 0),
        gist_layout=layout,
        use_cache=True,
        **{CACHE: cache},
    )


def _state(cache: GistCache, ids: torch.Tensor) -> CacheState:
    """The cache's state; an empty one, of the batch size of `ids`, before the first call."""
    return CacheState.empty(len(ids), ids.device) if cache.state is None else cache.state
