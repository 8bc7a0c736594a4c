"""The calls of a compression, planned on the host before the first one runs.

How long the segments are is known there. So the layout of a whole context is made once, in numpy, by the rule that all
layouts are made by (`gistkern.layout.schemes.from_roles`), and cut into calls at ends of segments: the compact rows of
earlier calls are the past of the next one, and intervals over them stay what they are. All that the device needs of all
calls goes there in one copy for each type, so nothing in the loop over the calls waits for it.

Samples stand at the left of the batch until the last call: one that has ended brings padding, and its rows stay in
front. Only then a ragged batch's rows are moved to the right, where a cache keeps them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from gistkern.cache.plan import CacheState, CallPlan
from gistkern.layout import positions
from gistkern.layout.fields import LayoutFields
from gistkern.layout.schemes import from_roles

__all__ = [
    "Call",
    "Context",
    "Placed",
    "Reading",
    "place_documents",
    "plan_segments",
    "plan_summary",
    "right_aligned",
    "summarize_documents",
]

# of a document: its segments, int64 [tokens] each
Context = Sequence[np.ndarray]


@dataclass(frozen=True)
class Call:
    """One model call and its plan, on the host of numpy arrays.

    `words` (int64 ``[B, N]``) are the ids that the model embeds, 0 in the places of gist tokens, where `rows` (int64
    ``[B, N]``) lists rows of the gist embedding.
    """

    words: Any
    rows: Any
    plan: CallPlan


@dataclass(frozen=True)
class Reading:
    """What a context's calls share.

    Position scheme, sink tokens, the first gist token's id, and raw tokens of a segment and of a call.
    """

    scheme: str
    sink_tokens: int
    first_id: int
    segment_length: int
    call_tokens: int

    @property
    def segments_per_call(self) -> int:
        """Whole segments; one that is longer than a call is a call of its own."""
        return max(1, self.call_tokens // self.segment_length)


@dataclass(frozen=True)
class _Stream:
    """Samples' segments, each with its gist tokens behind it: ids ``[B, N]``, padded on the right.

    `starts` marks the first token of each document, `ends` are the columns behind each segment of the longest sample.
    """

    ids: np.ndarray
    is_gist: np.ndarray
    valid: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[Sequence[Context]], gist_ids: Sequence[int]) -> _Stream:
        gists = np.asarray(gist_ids, dtype=np.int64)
        pieces = [[part for one in sample for segment in one for part in (segment, gists)] for sample in samples]
        rows = [np.concatenate(sample) for sample in pieces]
        longest = max(range(len(rows)), key=lambda sample: len(rows[sample]))
        ids = np.zeros((len(rows), len(rows[longest])), dtype=np.int64)
        valid, starts = np.zeros(ids.shape, dtype=bool), np.zeros(ids.shape, dtype=bool)
        for sample, row in enumerate(rows):
            ids[sample, : len(row)], valid[sample, : len(row)] = row, True
            lengths = [sum(map(len, one)) + len(one) * len(gists) for one in samples[sample]]
            starts[sample, np.cumsum([0, *lengths[:-1]])] = True
        ends = np.cumsum([len(piece) for piece in pieces[longest]])[1::2]
        return cls(ids, np.isin(ids, gists) & valid, valid, starts, ends)

    def cuts(self, reading: Reading, gists: int) -> list[int]:
        """Columns where calls end: whole segments, of as many raw tokens as fit."""
        most, found, begun = reading.segments_per_call * reading.segment_length, [0], 0
        raw = self.ends - gists * np.arange(1, len(self.ends) + 1)  # raw tokens up to each end
        for segment in range(1, len(self.ends)):
            if raw[segment] - begun > most:
                found.append(int(self.ends[segment - 1]))
                begun = raw[segment - 1]
        return [*found, int(self.ends[-1])]


def plan_segments(
    samples: Sequence[Sequence[Context]], gist_ids: Sequence[int], reading: Reading, apart: bool = False
) -> list[Call]:
    """Calls of many segments each, which see the gists of the earlier segments of their document.

    Parameters
    ----------
    samples : sequence
        Of each sample its documents, of each document its segments. Several samples have one document each, and all
        their segments but the last the same length.
    gist_ids : sequence of int
        What ends every segment.
    reading : Reading
    apart : bool
        Segments see nothing of each other, as those that a summary follows.
    """
    stream = _Stream.of(samples, gist_ids)
    documents = stream.starts if len(samples[0]) > 1 else None
    whole: Any = from_roles(stream.is_gist, stream.valid, sink_tokens=reading.sink_tokens, documents=documents)
    if apart:
        begins = stream.valid & (whole.local_begin == np.arange(stream.ids.shape[1]))
        whole = replace(
            whole,
            gist_end=whole.gist_begin,  # an empty interval
            gist_first_position=positions.gist_first(stream.is_gist, stream.valid, begins, restart=True),
        )
    cuts = np.array(stream.cuts(reading, len(gist_ids)))
    begins, ends = cuts[:-1], cuts[1:]
    # of each cut and sample, how many compact rows stand in front of it, and the columns that hold them
    owned = _rows_before(whole.gather, cuts, len(stream.ids[0]))
    columns = owned.max(1)
    # local rows are counted from where their call begins
    gather: Any = whole.gather[:, : columns[-1]]
    gather = np.where(gather >= 0, gather - begins.repeat(np.diff(columns)), -1)
    local_begin: Any = whole.local_begin - begins.repeat(ends - begins).astype(np.int32)
    seen = stream.valid.cumsum(1).T[ends - 1]
    behind = seen
    if reading.scheme == "gist_first":
        behind = np.full_like(seen, len(gist_ids)) if apart else stream.is_gist.cumsum(1).T[ends - 1]
    words, rows = _embedded(stream.ids, stream.is_gist, reading.first_id)

    none = np.zeros_like(seen[0])
    no_tail: Any = none[:, None][:, :0].astype(bool)
    keep_local, lengths = none + (ends - begins)[:, None], seen.max(1).tolist()
    calls, past = [], columns.tolist()
    capacity = past[-1] if len(begins) > 1 else 0
    for number, (begin, end) in enumerate(itertools.pairwise(cuts.tolist())):
        now, stored = slice(begin, end), past[number + 1]
        absolute, gist_first = whole.stream_position[:, now], whole.gist_first_position[:, now]
        gist_begin = whole.gist_begin[:, now]
        layout: Any = LayoutFields(
            gist_begin,
            gist_begin if apart else whole.gist_end[:, now],
            local_begin[:, now],
            gather[:, past[number] : stored],
            whole.is_gist[:, now],
            absolute,
            gist_first,
            keep_begin=none,
            keep_end=owned[number + 1],
            keep_local=keep_local[number],
            past=past[number],
        )
        state = CacheState(
            seen[number], owned[number + 1], none, behind[number], no_tail, stored, 0, length=lengths[number]
        )
        place = absolute if reading.scheme == "absolute" else gist_first
        known: Any = {"keep_tail": slice(end - begin, end - begin), "real": stream.valid[:, now]}
        plan = CallPlan(layout, place, state, **known, context=True, capacity=capacity)
        calls.append(Call(words[:, now], rows[:, now], plan))
    return calls


def _rows_before(gather: np.ndarray, cuts: np.ndarray, columns: int) -> np.ndarray:
    """int64 ``[cuts, B]``: how many of the rows that `gather` lists of each sample stand in front of each cut."""
    sample, place = np.nonzero(gather >= 0)
    count = np.zeros((columns + 1, len(gather)), dtype=np.int64)
    np.add.at(count, (gather[sample, place] + 1, sample), 1)
    return count.cumsum(0)[cuts]


def _embedded(ids: np.ndarray, is_gist: np.ndarray, first_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`words` and `rows` of a `Call`, of ids with gist tokens in them, which are `first_id` and those behind it."""
    return np.where(is_gist, 0, ids), np.where(is_gist, ids - first_id, 0)


def _state(seen: Any, gist_rows: Any, tail_position: Any) -> CacheState:
    none = np.zeros_like(seen)
    is_gist = none[:, None][:, :0].astype(bool)
    return CacheState(
        seen,
        gist_rows,
        none,
        tail_position,
        is_gist,
        gist_columns=int(gist_rows.max()),
        tail_columns=0,
        length=int(seen.max()),
    )


def _closed(layout: LayoutFields, place: Any, state: CacheState, real: Any, keep_gists: Any = None) -> CallPlan:
    """A call that ends its last segment, so that no tail stays."""
    rows = layout.num_rows
    vectors: Any = layout
    return CallPlan(vectors, place, state, keep_gists=keep_gists, keep_tail=slice(rows, rows), real=real, context=True)


def right_aligned(calls: list[Call]) -> list[Call]:
    """The calls, of which the last leaves each sample's rows in the last columns, where a cache has them."""
    after = calls[-1].plan.after
    count: Any = after.gist_rows
    if (count == after.gist_columns).all():
        return calls
    column = np.arange(after.gist_columns) - (after.gist_columns - count)[:, None]
    return [*calls[:-1], replace(calls[-1], plan=replace(calls[-1].plan, keep_gists=column.clip(min=0)))]


def plan_summary(calls: list[Call], sinks: np.ndarray, gist_ids: Sequence[int], reading: Reading) -> list[Call]:
    """The calls, and one of gists that stay, which see all others of their sample.

    Of the compact rows before them each sample's last `sinks`, int64 ``[B]``, stay too: its sink tokens, which the last
    call puts there.
    """
    last, after = calls[-1], calls[-1].plan.after
    counts: Any = after.gist_rows
    columns, behind = after.gist_columns, len(gist_ids)
    # right-aligned, and in each sample the sinks behind its gists
    column = np.arange(columns) - (columns - counts)[:, None]
    order: Any = np.where(column >= 0, (column + sinks[:, None]) % counts[:, None], 0)
    moved = replace(last, plan=replace(last.plan, keep_gists=order if (order != np.arange(columns)).any() else None))

    valid = np.ones((len(counts), behind), dtype=bool)
    layout = from_roles(valid, valid, sink_tokens=0, past=columns, past_rows=counts)
    none: Any = after.tail_rows
    kept: dict[str, Any] = {"keep_begin": columns - sinks, "keep_end": none + columns + behind}
    layout = replace(layout, **kept, keep_local=none + behind)
    place = layout.stream_position if reading.scheme == "absolute" else layout.gist_first_position
    state = _state(after.seen + behind, sinks + behind, after.tail_position + behind)
    ids = np.tile(np.asarray(gist_ids, dtype=np.int64), (len(counts), 1))
    most = state.gist_columns
    of_both = slice(columns + behind - most, columns + behind) if most < columns + behind else None
    plan = _closed(layout, place + after.tail_position[:, None], state, valid, of_both)
    return [*calls[:-1], moved, Call(*_embedded(ids, valid, reading.first_id), plan)]


# ---- documents one behind the other in one row of the batch


class Placed(NamedTuple):
    """Where a document's rows stand among the compact rows (columns, int64), its tokens, the position behind them."""

    columns: np.ndarray
    seen: int
    tail_position: int


def place_documents(calls: list[Call], documents: Sequence[Context], gists: int, reading: Reading) -> list[Placed]:
    """Each document's rows after calls that one sample of all of them makes, each segment with so many gists."""
    tokens = [sum(map(len, one)) + gists * len(one) for one in documents]
    begins = np.cumsum([0, *(call.plan.layout.num_rows for call in calls)])
    gathered = [call.plan.layout.gather[0] + begin for call, begin in zip(calls, begins, strict=False)]
    rows = np.searchsorted(np.concatenate(gathered), np.cumsum([0, *tokens]))
    behind = tokens if reading.scheme == "absolute" else [gists * len(one) for one in documents]
    return [
        Placed(np.arange(*between), seen, position)
        for between, seen, position in zip(itertools.pairwise(rows), tokens, behind, strict=True)
    ]


def summarize_documents(
    calls: list[Call], documents: Sequence[Context], segment_gists: int, gist_ids: Sequence[int], reading: Reading
) -> tuple[list[Call], list[Placed]]:
    """`plan_summary` of documents in one row: the calls, and where each document's sinks and summary stand."""
    placed, count = place_documents(calls, documents, segment_gists, reading), len(gist_ids)
    sinks = [min(len(one[0]), reading.sink_tokens) for one in documents]
    order: Any = np.concatenate([np.roll(one.columns, -raw) for one, raw in zip(placed, sinks, strict=True)])
    moved = replace(calls[-1], plan=replace(calls[-1].plan, keep_gists=order[None]))
    begin = np.array([one.columns[0] for one in placed]).repeat(count)[None]
    end = np.array([one.columns[-1] + 1 for one in placed]).repeat(count)[None]

    valid = np.ones(begin.shape, dtype=bool)
    starts = np.arange(valid.size)[None] % count == 0
    layout = from_roles(valid, valid, sink_tokens=0, documents=starts)
    first = len(order)
    changes: dict[str, Any] = {"gist_begin": begin.astype(np.int32), "gist_end": end.astype(np.int32)}
    layout = replace(layout, **changes, past=first)
    behind = [one.seen if reading.scheme == "absolute" else segment_gists for one in placed]
    place = layout.stream_position if reading.scheme == "absolute" else layout.gist_first_position
    state = calls[-1].plan.after
    state = _state(state.seen + valid.size, state.gist_rows + valid.size, state.tail_position)
    plan = _closed(layout, place + np.array(behind).repeat(count), state, valid)
    ids = np.tile(np.asarray(gist_ids, dtype=np.int64), (1, len(placed)))
    found = []
    for number, (one, raw, position) in enumerate(zip(placed, sinks, behind, strict=True)):
        of_sinks = one.columns[len(one.columns) - raw :]
        summary = first + np.arange(number * count, (number + 1) * count)
        found.append(Placed(np.concatenate([of_sinks, summary]), one.seen + count, position + count))
    return [*calls[:-1], moved, Call(*_embedded(ids, valid, reading.first_id), plan)], found
