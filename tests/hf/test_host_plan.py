"""Calls that are planned in numpy beforehand are those that a cache plans one by one, from the rows that it holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st

import gistkern
from gistkern.cache.cache import GistCache
from gistkern.cache.host_copy import _tensors, on_device
from gistkern.cache.host_plan import Call, Reading, plan_segments, plan_summary, right_aligned
from gistkern.cache.plan import CacheState, plan_call, plan_layout
from gistkern.cache.versions import CACHE
from gistkern.corpus.rows import documents_of
from gistkern.hf.compress import compress_documents
from gistkern.layout import positions
from gistkern.layout.checks import check_intervals, check_kept
from gistkern.layout.layout import layout_of
from gistkern.layout.schemes import from_roles
from gistkern.layout.streams import left_padded, segments_of

FIRST, WORDS = 900, 100


@st.composite
def contexts(draw):
    """Segments of a batch, and how they are read: `_Stream` says which batches there are."""
    length = draw(st.integers(1, 9))
    overlap = draw(st.integers(0, length - 1))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    if draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    samples = [segments_of(rng.integers(0, WORDS, count), length, overlap) for count in lengths]
    sinks = draw(st.integers(0, length))
    scheme = draw(st.sampled_from(positions.SCHEMES))
    return samples, Reading(scheme, sinks, FIRST, length, draw(st.integers(1, 30)))


def one_by_one(samples, gists, reading, apart):
    """(ids, valid, plan) of each call: samples are padded on the left, and plans follow from the state before."""
    state, ends = CacheState.empty(len(samples), "cpu"), torch.tensor(gists)
    step = reading.segments_per_call
    for first in range(0, max(map(len, samples)), step):
        now = [[torch.from_numpy(one) for one in segments[first : first + step]] for segments in samples]
        ids, valid = left_padded([torch.cat([ends[:0], *(t for one in row for t in (one, ends))]) for row in now])
        is_gist = (ids >= reading.first_id) & valid
        if apart:
            plan = independent(state, is_gist, valid, reading)
        else:
            plan = plan_call(state, is_gist, valid, scheme=reading.scheme, sink_tokens=reading.sink_tokens, closed=True)
        yield ids, valid, plan
        state = plan.after


def independent(state, is_gist, valid, reading):
    layout = layout_of(
        from_roles(
            is_gist,
            valid,
            sink_tokens=reading.sink_tokens,
            past=state.gist_columns,
            past_rows=state.gist_rows,
            seen=state.seen,
        )
    )
    starts = valid & (layout.local_begin == layout.row_index())
    apart = replace(
        layout.closed(),
        gist_end=layout.gist_begin,
        gist_first_position=positions.gist_first(layout.is_gist, valid, starts, restart=True),
    )
    place = apart.positions(reading.scheme)
    if reading.scheme == "absolute":
        place = place + state.seen[:, None]
    return plan_layout(state, apart, place.masked_fill(~valid, 0), is_gist)


def summary(state, sinks, reading, gists):
    """Which columns the summary finds, and its plan."""
    column = torch.arange(state.gist_columns)
    first = (state.gist_columns - state.gist_rows)[:, None]
    order = torch.where(column >= first, first + (column - first + sinks[:, None]) % state.gist_rows[:, None], column)
    valid = torch.ones(len(sinks), len(gists), dtype=torch.bool)
    layout = layout_of(from_roles(valid, valid, sink_tokens=0, past=state.gist_columns, past_rows=state.gist_rows))
    last = replace(layout.closed(), keep_begin=state.gist_columns - sinks)
    place = last.positions(reading.scheme) + state.tail_position[:, None]
    return order, plan_layout(state, last, place, valid)


def same_state(found, expected):
    for name in ("seen", "gist_rows", "tail_rows", "tail_position", "tail_is_gist"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("gist_columns", "tail_columns", "length", "tail_has_gists", "moving"):
        assert getattr(found, name) == getattr(expected, name), name


@settings(max_examples=60)
@given(contexts(), st.booleans(), st.integers(1, 3))
def test_plans_are_those_made_call_by_call(drawn, apart, count):
    samples, reading = drawn
    gists = list(range(FIRST, FIRST + count))
    host = right_aligned(plan_segments([[one] for one in samples], gists, reading, apart))
    expected = list(one_by_one(samples, gists, reading, apart))
    calls = list(on_device(host, torch.device("cpu")))
    assert len(calls) == len(expected)
    for call, (ids, valid, plan) in zip(calls, expected, strict=True):
        found, layout, other = call.plan, call.plan.layout, plan.layout
        check_intervals(layout)
        check_kept(layout)
        causal = torch.ones(layout.num_rows, layout.num_rows, dtype=torch.bool).tril()
        assert layout.plain == (not layout.past and bool((layout.token_mask() == causal).all()))
        assert (layout.past, layout.num_compact, layout.tail) == (other.past, other.num_compact, 0)
        # a sample's real tokens are the same ones, on the other side of the padding, over the same rows
        assert torch.equal(found.real.sum(1), valid.sum(1))
        where = [found.real[:, :, None], valid[:, :, None]]
        both = [
            torch.stack([words + rows + FIRST * gist, gist, place, begin, end, local - offset[:, None]], 2)
            for words, rows, gist, place, begin, end, local, offset in [
                (
                    *(call.words, call.rows, layout.is_gist, found.position_ids),
                    *(layout.gist_begin, layout.gist_end, layout.local_begin, torch.zeros(len(ids))),
                ),
                (
                    *(ids.masked_fill(plan.layout.is_gist, 0), (ids - FIRST).clamp(min=0), other.is_gist),
                    *(plan.position_ids, other.gist_begin, other.gist_end, other.local_begin, (~valid).sum(1)),
                ),
            ]
        ]
        assert torch.equal(*(one[mask.expand_as(one)] for one, mask in zip(both, where, strict=True)))
        gathered = other.gather - torch.where(other.gather >= 0, (~valid).sum(1)[:, None], 0)
        assert torch.equal(layout.gather, gathered)
        assert (found.after.gist_columns, found.after.length) == (plan.after.gist_columns, plan.after.length)
    same_state(calls[-1].plan.after, plan.after)


@settings(max_examples=60)
@given(contexts(), st.integers(1, 3), st.integers(1, 3))
def test_a_summary_sees_the_same_rows_in_the_same_order(drawn, segment_gists, count):
    samples, reading = drawn
    gists = list(range(FIRST, FIRST + segment_gists + count))
    host = plan_segments([[one] for one in samples], gists[:segment_gists], reading, apart=True)
    sinks = torch.tensor([min(len(one[0]), reading.sink_tokens) for one in samples])
    *_, before, call = on_device(plan_summary(host, sinks.numpy(), gists[segment_gists:], reading), torch.device("cpu"))
    *_, (_, _, plan) = one_by_one(samples, gists[:segment_gists], reading, apart=True)
    order, expected = summary(plan.after, sinks, reading, gists[segment_gists:])
    rows = torch.tensor(host[-1].plan.after.gist_rows)
    kept = before.plan.keep_gists
    kept = torch.arange(host[-1].plan.after.gist_columns).expand(len(rows), -1) if kept is None else kept
    owned = torch.arange(kept.shape[1]) >= kept.shape[1] - rows[:, None]
    # the order of rows at the right of the buffer, of rows that stood at its left until then
    assert torch.equal((kept + (kept.shape[1] - rows)[:, None])[owned], order[owned])
    for name in ("gist_begin", "gist_end", "local_begin", "gather", "keep_begin", "keep_end", "keep_local"):
        assert torch.equal(getattr(call.plan.layout, name), getattr(expected.layout, name)), name
    assert torch.equal(call.plan.position_ids, expected.position_ids)
    assert call.plan.keep_gists == expected.keep_gists
    assert (call.rows == torch.arange(segment_gists, segment_gists + count)).all()
    same_state(call.plan.after, expected.after)


def streamed(model, ids, mask, length, overlap, tokens):
    """What `compress` makes of calls that are planned one by one, each from the state before it."""
    handle = model.gistkern_handle
    reading = Reading(handle.positions, handle.sink_tokens, handle.first_id, length, tokens)
    samples = [segments_of(row[real].numpy(), length, overlap) for row, real in zip(ids, mask.bool(), strict=True)]
    cache, apart = GistCache(), bool(handle.segment_gist_token_ids)

    def run(ids, plan):
        rows = (ids - handle.first_id).clamp(min=0)
        call = Call(ids.masked_fill(plan.layout.is_gist, 0), rows, replace(plan, real=plan.layout.is_real()))
        handle.inner(gist_plan=call, use_cache=True, **{CACHE: cache})

    gists = handle.segment_gist_token_ids if apart else handle.gist_token_ids
    with torch.no_grad():
        for now, _, plan in one_by_one(samples, gists, reading, apart):
            run(now, plan)
        if apart:
            sinks = torch.tensor([min(len(one[0]), handle.sink_tokens) for one in samples])
            order, last = summary(cache.state, sinks, reading, handle.gist_token_ids)
            for layer in cache.layers:
                layer.keep_gists(order)
            run(torch.tensor(handle.gist_token_ids).expand(len(ids), -1), last)
    return cache


@pytest.mark.parametrize("summary_of", [0, 2], ids=["segments", "hierarchical"])
@pytest.mark.parametrize("scheme", positions.SCHEMES)
@pytest.mark.parametrize(("lengths", "overlap"), [((41,), 0), ((41, 41), 3), ((40, 3, 23, 1), 0), ((17, 40), 2)])
def test_caches_are_bit_for_bit_those_of_calls_planned_one_by_one(monkeypatch, summary_of, scheme, lengths, overlap):
    model = make_model(dtype=torch.float32)
    gistkern.patch(model, num_gist_tokens=3, num_segment_gist_tokens=summary_of, positions=scheme, sink_tokens=2)
    ids, mask = left_padded([random_ids(1, count, seed=count)[0] for count in lengths])
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: 16)
    found = gistkern.compress(model, ids, mask, segment_length=7, segment_overlap=overlap)
    expected = streamed(model, ids, mask, 7, overlap, 16)
    same_state(found.state, expected.state)
    owned = found.state.owned_gists()[:, None, :, None]
    for one, other in zip(found.layers, expected.layers, strict=True):
        for a, b in zip(one.gist.tensors(), other.gist.tensors(), strict=True):
            assert torch.equal(a.masked_fill(~owned, 0), b.masked_fill(~owned, 0))
        assert one.tail.key.shape == other.tail.key.shape


def test_what_is_sent_to_a_device_is_the_same():
    """Of a device the arrays become views of one buffer for each type, at whole 16 bytes."""
    rng = np.random.default_rng(0)
    arrays = [
        *(rng.integers(0, 9, (2, count)) for count in (1, 16, 5)),
        rng.integers(0, 9, (3, 7)).astype(np.int32),
        *(rng.random((2, count)) > 0.5 for count in (3, 0)),
    ]
    views = _tensors(arrays, torch.device("cpu"), packed=True)
    for array, view in zip(arrays, views, strict=True):
        assert np.array_equal(view.numpy(), array)
        assert view.is_contiguous()
        assert view.storage_offset() * view.itemsize % 16 == 0
    assert len({view.untyped_storage().data_ptr() for view in views}) == 3


@pytest.mark.parametrize("summary_of", [0, 2], ids=["segments", "hierarchical"])
@pytest.mark.parametrize("scheme", positions.SCHEMES)
@pytest.mark.parametrize(("length", "overlap"), [(7, 0), (7, 3), (None, 0)])
def test_documents_in_one_row_are_what_each_is_alone(monkeypatch, summary_of, scheme, length, overlap):
    if summary_of and length is None:
        pytest.skip("a hierarchical model compresses in segments")
    model = make_model()
    gistkern.patch(model, num_gist_tokens=3, num_segment_gist_tokens=summary_of, positions=scheme, sink_tokens=2)
    documents = [random_ids(1, count, seed=count)[0].tolist() for count in (40, 3, 23, 1, 2, 16, 9)]
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: 16)
    calls = []
    with model.model.register_forward_pre_hook(lambda module, given, more: calls.append(more), with_kwargs=True):
        cache, placed = compress_documents(model, documents, length, overlap)
    full = [call["attention_mask"] for call in calls]
    assert all(bool(one.all()) for one in full), "no padding"
    for document, found in zip(documents, documents_of(cache, placed), strict=True):
        alone = gistkern.compress(model, [document], segment_length=length, segment_overlap=overlap)
        rows = torch.stack([torch.stack(alone.compact(layer))[:, 0] for layer in range(len(alone.layers))])
        torch.testing.assert_close(found.rows, rows.permute(3, 0, 1, 2, 4), rtol=0, atol=1e-12)
        assert found.seen == int(alone.state.seen)
        assert found.tail_position == int(alone.state.tail_position)
