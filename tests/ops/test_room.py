"""New compact rows that are written behind the past ones, into the buffer that holds them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layouts

from gistkern import GistLayout, backends
from gistkern.ops.attention import AttentionOptions, attend
from gistkern.testing import make_inputs

ON_CPU = [name for name in ("cpu", "sdpa") if backends.get(name).missing() is None]
SEGMENT = GistLayout.from_segments([9, 7], 2, tail=3, past=5)
BOTH = GistLayout.from_input_ids(torch.tensor([[1, 2, 90, 90, 3], [1, 90, 4, 90, 90]]), [90], past=5)


def room_for(inputs, layout, spare, dtype):
    """Buffers that begin with the past rows and hold NaN behind them; and the past rows as views of them."""
    batch, heads, _, dim = inputs.k.shape
    room = tuple(torch.full((batch, heads, layout.num_compact + spare, dim), torch.nan, dtype=dtype) for _ in range(2))
    past = None, None
    if layout.past:
        for buffer, rows in zip(room, (inputs.past_key, inputs.past_value), strict=True):
            buffer[:, :, : layout.past] = rows.detach()
        past = tuple(buffer[:, :, : layout.past] for buffer in room)
    return room, past


def case(layout=SEGMENT, spare=3, dtype=torch.float32, seed=0):
    """q, k, v without gradients, room and past rows."""
    inputs = make_inputs(layout, heads=6, kv_heads=2, head_dim=24, dtype=dtype, seed=seed)
    return (inputs.q.detach(), inputs.k.detach(), inputs.v.detach()), *room_for(inputs, layout, spare, dtype)


def call(given, layout, room, past, backend="auto", **more):
    return attend(
        *given, layout, AttentionOptions(None, backend), past_key=past[0], past_value=past[1], room=room, **more
    )


def lie_in(rows, room):
    return [one.data_ptr() == buffer.data_ptr() for one, buffer in zip(rows, room, strict=True)]


@given(
    layouts(),
    st.sampled_from(ON_CPU),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 3),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_answers_and_rows_are_those_of_new_memory(layout, backend, dtype, spare, seed):
    given, room, past = case(layout, spare, dtype, seed)
    expected = call(given, layout, None, [None if t is None else t.clone() for t in past], backend)
    before = [buffer.clone() for buffer in room]
    found = call(given, layout, room, past, backend)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    if layout.gather.shape[1]:
        assert lie_in(found[2:], room) == [True, True]
    for buffer, old in zip(room, before, strict=True):
        assert torch.equal(buffer[:, :, : layout.past], old[:, :, : layout.past])
        assert buffer[:, :, layout.num_compact :].isnan().all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_calls_that_follow_each_other_fill_one_buffer(backend):
    """Each with a plan for its own past rows, and again for other tensors of the same shapes."""
    layouts_of = [GistLayout.from_segments([6], 2, sink_tokens=1, past=past) for past in (0, 3, 5)]
    for seed in (0, 1):
        inputs = [make_inputs(one, head_dim=16, seed=seed + one.past) for one in layouts_of]
        batch, heads, _, dim = inputs[0].k.shape
        room = tuple(torch.full((batch, heads, 7, dim), torch.nan) for _ in range(2))
        rows, past = [None, None], [None, None]
        for one, layout in zip(inputs, layouts_of, strict=True):
            given = [t.detach().float() for t in (one.q, one.k, one.v)]
            expected = call(given, layout, None, past, backend)
            out, _, *rows = call(given, layout, room, rows, backend)
            past = expected[2:]
            assert torch.equal(out, expected[0])
            assert all(map(torch.equal, rows, past))
        assert lie_in(rows, room) == [True, True]
        assert all(map(torch.equal, room, past))


@pytest.mark.parametrize("learns", [0, 1, 2])
def test_with_gradients_rows_are_copied(learns):
    given, room, past = case()
    given[learns].requires_grad_()
    out, _, *rows = call(given, SEGMENT, room, past)
    assert lie_in(rows, room) == [False, False]
    assert room[0][:, :, SEGMENT.past :].isnan().all()
    (gradient,) = torch.autograd.grad(out.sum(), given[learns])
    assert gradient.isfinite().all()
    with torch.no_grad():
        assert lie_in(call(given, SEGMENT, room, past)[2:], room) == [True, True]


def test_under_operators_rows_are_copied():
    given, room, past = case()
    compiled = torch.compile(
        lambda *t: attend(*t[:3], SEGMENT, AttentionOptions(), past_key=t[3], past_value=t[4], room=t[5:]),
        backend="eager",
        fullgraph=True,
    )
    found = compiled(*given, *past, *room)
    assert lie_in(found[2:], room) == [False, False]
    assert room[0][:, :, SEGMENT.past :].isnan().all()
    for one, other in zip(found, call(given, SEGMENT, None, past), strict=True):
        assert torch.equal(one, other)


def test_rows_that_do_not_fit_get_new_memory():
    given, room, past = case(spare=-1)
    expected = call(given, SEGMENT, None, past)
    found = call(given, SEGMENT, room, past)
    assert lie_in(found[2:], room) == [False, False]
    assert all(map(torch.equal, found, expected))
    assert room[0][:, :, SEGMENT.past :].isnan().all()


def test_a_call_without_new_rows_hands_back_the_past_ones():
    layout = GistLayout.decode(5, 8)
    given, room, past = case(layout)
    assert call(given, layout, room, past)[2:] == past


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_backward_of_before_may_still_run(backend):
    """It has saved rows of the buffer; those that are written behind them are none of its."""
    given, room, past = case()
    grown = call(given, SEGMENT, room, past, backend)[2:]
    question = GistLayout.from_segments([], 1, tail=4, past=SEGMENT.num_compact)
    asked = make_inputs(question, heads=6, kv_heads=2, head_dim=24, dtype=torch.float32)
    loss = call((asked.q, asked.k, asked.v), question, None, grown, backend)[0].sum()
    expected = torch.autograd.grad(loss, asked.q, retain_graph=True)[0]
    longer = tuple(torch.cat([buffer, buffer], 2) for buffer in room)
    again = [buffer[:, :, : SEGMENT.past] for buffer in longer]
    loss = call((asked.q, asked.k, asked.v), question, None, call(given, SEGMENT, longer, again, backend)[2:], backend)[
        0
    ].sum()
    more = GistLayout.from_segments([6], 2, past=SEGMENT.num_compact)
    inputs = make_inputs(more, heads=6, kv_heads=2, head_dim=24, dtype=torch.float32)
    grown = tuple(buffer[:, :, : more.past] for buffer in longer)
    found = call([t.detach() for t in (inputs.q, inputs.k, inputs.v)], more, longer, grown, backend)
    assert lie_in(found[2:], longer) == [True, True]
    assert torch.equal(torch.autograd.grad(loss, asked.q)[0], expected)


@pytest.mark.parametrize("again", [False, True], ids=["first", "after a plan"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda room, past: (room, [t.clone() for t in past]), "first 5 rows"),
        (lambda room, past: (room, past[::-1]), "first 5 rows"),
        (lambda room, past: ((room[0], room[0]), (past[0], past[0])), "same place"),
        (lambda room, past: (room[0], past), "pair"),
        (lambda room, past: ((room[0], None), past), "pair"),
        (lambda room, past: (tuple(t.double() for t in room), past), "float64"),
        (lambda room, past: (tuple(t[..., :16].contiguous() for t in room), past), "must be"),
        (lambda room, past: (tuple(t[:, :1].contiguous() for t in room), past), "must be"),
        (lambda room, past: (tuple(t[0] for t in room), past), "must be"),
        (lambda room, past: (tuple(t[:, :, :-1] for t in room), past), "contiguous"),
        (lambda room, past: (tuple(t[:1].expand(t.shape) for t in room), past), "contiguous"),
        (lambda room, past: (tuple(t.clone().requires_grad_() for t in room), past), "learn"),
        (lambda room, past: (tuple(torch._neg_view(t) for t in room), past), "contiguous"),
        (lambda room, past: (tuple(t.to("meta") for t in room), past), "meta"),
    ],
)
def test_what_is_no_room_is_refused(change, message, again):
    layout = BOTH
    given, room, past = case(layout)
    if again:
        call(given, layout, room, past)
    room, past = change(room, past)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call(given, layout, room, past)
