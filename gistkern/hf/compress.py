"""`compress`: a context becomes a `GistCache`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from gistkern.cache.cache import GistCache
from gistkern.cache.plan import CacheState, CallPlan, plan_call, plan_layout
from gistkern.cache.tokens_read import ContextRead, TokensRead
from gistkern.cache.versions import CACHE
from gistkern.hf.contexts import evaluating, read_context
from gistkern.hf.handle import GistHandle, handle_of
from gistkern.layout import positions
from gistkern.layout.checks import trusted
from gistkern.layout.layout import layout_of
from gistkern.layout.schemes import from_roles
from gistkern.layout.streams import check_segmentation, left_padded, segments_of
from gistkern.rows import check_gist_dtype

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
    *,
    gist_dtype: torch.dtype | None = None,
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
    gist_dtype : torch.dtype, optional
        What the gist rows are held in when all is read: int8 or float8_e4m3fn, as `GistCache.to` makes them of the
        model's own dtype, in which they stay by default.

    Returns
    -------
    GistCache
        With an empty tail, ready for ``model.generate(question_ids, past_key_values=cache.clone())``.

    Raises
    ------
    ValueError
        If the model is not patched, a sample is empty, the context holds gist tokens already, or gist rows are not
        held in `gist_dtype`.
    TypeError
        If the context is a text.

    Notes
    -----
    The calls of the model are planned on the host, one after the other, and none waits for the device.

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
    given, valid = read_context(handle, input_ids, attention_mask)
    handle.check_settings()
    handle.warn_if_untrained()
    handle.warn_if_cut_otherwise(segment_length, segment_overlap)

    length = segment_length or given.shape[1]
    real = [sample[mask] for sample, mask in zip(given.cpu(), valid.cpu(), strict=True)]
    samples = [segments_of(sample, length, segment_overlap) for sample in real]
    scheme = _hierarchical if handle.segment_gist_token_ids else _segment_wise
    with evaluating(handle.inner):
        cache = scheme(_Compression(handle, samples, length, given.device))
    assert cache.state is not None
    cache.state, cache.read = replace(cache.state, fed=0), TokensRead()
    cache.contexts = set(map(ContextRead.of, real))
    cache.fingerprint = handle.fingerprint()
    return cache.to(gist_dtype=gist_dtype)


class _Compression:
    """A compression under way: the cache, and on the host the segments and the state that calls are planned from."""

    def __init__(
        self, handle: GistHandle, samples: list[list[torch.Tensor]], length: int, device: torch.device
    ) -> None:
        self.handle, self.samples, self.length, self.device = handle, samples, length, device
        self.cache, self.state = GistCache(), CacheState.empty(len(samples), "cpu")

    def calls(self, ends: list[int], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Ids of calls of about `tokens` raw tokens, and which are real: segments, each with its gists behind it."""
        step, gists = max(1, tokens // self.length), torch.tensor(ends)
        for first in range(0, max(len(segments) for segments in self.samples), step):
            now = [segments[first : first + step] for segments in self.samples]
            yield left_padded(
                [torch.cat([gists[:0], *(t for one in segments for t in (one, gists))]) for segments in now]
            )

    def run(self, ids: torch.Tensor, plan: CallPlan) -> None:
        """One call of the inner model; each layer's raw rows go as soon as the layer is through."""
        there = plan.on(self.device)
        self.handle.inner(
            input_ids=ids.to(self.device, non_blocking=True), gist_plan=there, use_cache=True, **{CACHE: self.cache}
        )
        self.state = plan.after


def _segment_wise(work: _Compression) -> GistCache:
    """Segments that see the gists of all before them, many per call; samples that have ended bring padding only."""
    handle = work.handle
    tokens = CPU_CALL_TOKENS if work.device.type == "cpu" else CALL_TOKENS
    for ids, valid in work.calls(handle.gist_token_ids, tokens):
        plan = plan_call(
            work.state,
            handle.is_gist(ids) & valid,
            None if bool(valid.all()) else valid,
            scheme=handle.positions,
            sink_tokens=handle.sink_tokens,
            closed=True,
        )
        work.run(ids, plan)
    return work.cache


def _hierarchical(work: _Compression) -> GistCache:
    """Independent segments, many per call, then one call of summary gists that sees all segment gists."""
    handle = work.handle
    if handle.sink_tokens > work.length:
        raise ValueError(f"segment_length must be at least the {handle.sink_tokens} sink tokens, got {work.length}")
    for ids, valid in work.calls(handle.segment_gist_token_ids, CALL_TOKENS):
        work.run(ids, _independent(work, handle.is_gist(ids), valid))
    # a raw sink stands apart from the gists; in a context shorter than sink_tokens gists are sinks as well
    sinks = torch.tensor([min(len(segments[0]), handle.sink_tokens) for segments in work.samples])
    columns = _sinks_last(work.state, sinks).to(work.device)
    for layer in work.cache.layers:
        layer.keep_gists(columns)
    ids = torch.tensor(handle.gist_token_ids).expand(len(sinks), -1)
    work.run(ids, _summary(work, torch.ones_like(ids, dtype=torch.bool), sinks))
    return work.cache


def _independent(work: _Compression, is_gist: torch.Tensor, valid: torch.Tensor) -> CallPlan:
    """Segments of which none sees another."""
    state, scheme = work.state, work.handle.positions
    layout = layout_of(
        from_roles(
            is_gist,
            valid,
            sink_tokens=work.handle.sink_tokens,
            past=state.gist_columns,
            past_rows=state.gist_rows,
            seen=state.seen,
        )
    )
    starts = valid & (layout.local_begin == layout.row_index())
    apart = replace(
        layout.closed(),
        gist_end=layout.gist_begin,  # an empty interval
        gist_first_position=positions.gist_first(layout.is_gist, valid, starts, restart=True),
    )
    place = apart.positions(scheme)
    if scheme == "absolute":
        place = place + state.seen[:, None]
    return plan_layout(state, trusted(apart, layout), place.masked_fill(~valid, 0), is_gist)


def _summary(work: _Compression, valid: torch.Tensor, sinks: torch.Tensor) -> CallPlan:
    """The gists that stay, which see all others; of those the last rows, each sample's sinks, stay too."""
    state = work.state
    layout = layout_of(from_roles(valid, valid, sink_tokens=0, past=state.gist_columns, past_rows=state.gist_rows))
    last = trusted(replace(layout.closed(), keep_begin=state.gist_columns - sinks), layout)
    return plan_layout(state, last, last.positions(work.handle.positions) + state.tail_position[:, None], valid)


def _sinks_last(state: CacheState, sinks: torch.Tensor) -> torch.Tensor:
    """Gist columns with each sample's `sinks` sink rows behind its gists, next to the summary that stays with them."""
    column = torch.arange(state.gist_columns)
    first = (state.gist_columns - state.gist_rows)[:, None]
    return torch.where(column >= first, first + (column - first + sinks[:, None]) % state.gist_rows[:, None], column)
