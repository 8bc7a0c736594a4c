"""The CPU backward that adds gathered rows' gradients into those of the local rows they were gathered from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts

from gistkern import GistLayout
from gistkern.backends import native, reference
from gistkern.kernels.arguments import AttentionArguments
from gistkern.rows import compact, compact_backward
from gistkern.testing import assert_within_budget, make_inputs

if native.missing() is not None:
    pytest.skip("needs the extension", allow_module_level=True)
from gistkern.backends import cpu

SCALE = 0.3
TYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("dq", "dk", "dv", "dpast_k", "dpast_v")


def hostile_call(batch, rows, past, width, tail, group, dim):
    """Tensors of a call whose intervals and gather list merely lie in their buffers.

    Intervals in any order; tokens listed several times, and fillers, which no row sees.
    """
    local, columns = tail + rows, past + width
    shapes = {"q": (2 * group, rows), "k": (2, local), "v": (2, local), "past_k": (2, past), "past_v": (2, past)}
    shapes["grad_out"] = shapes["q"]
    tensors = {name: torch.randn(batch, *shape, dim, dtype=torch.float64) for name, shape in shapes.items()}
    gather = torch.randint(-1, local, (batch, width))
    gather[:, 1::3] = gather[:, :1]
    begin, end = torch.randint(0, columns + 1, (2, batch, rows)).sort(0).values
    fillers = torch.nn.functional.pad((gather < 0).long().cumsum(1), (past + 1, 0))
    end = torch.where(fillers.gather(1, begin) == fillers.gather(1, end), end, begin)
    start = torch.stack([torch.randint(0, tail + row + 2, (batch,)) for row in range(rows)], 1)
    return tensors, tuple(vector.int() for vector in (begin, end, start)), gather


def oracle(tensors, intervals, gather, dtype):
    """Gradients of the dense reference, which autograd carries back through the gather."""
    leaves = [tensors[name].to(dtype).requires_grad_() for name in ("q", "k", "v", "past_k", "past_v")]
    q, k, v, *past = leaves
    out, _ = reference.forward(AttentionArguments(q, k, v, *compact(k, v, *past, gather), *intervals, SCALE))
    return torch.autograd.grad(out, leaves, tensors["grad_out"].to(dtype))


def folded_and_composed(tensors, intervals, gather):
    """(ours, the gradients put together from `backward` and `compact_backward`, those of the local rows alone)."""
    q, k, v, past_k, past_v, grad_out = tensors.values()
    arguments = AttentionArguments(q, k, v, *compact(k, v, past_k, past_v, gather), *intervals, SCALE)
    saved = cpu.forward(arguments)
    dq, dk, dv, *dgist = cpu.backward(arguments, grad_out, *saved)
    past = past_k.shape[2]
    added = compact_backward(*(g[:, :, past:] for g in dgist), gather, k.shape[2])
    composed = dq, dk + added[0], dv + added[1], *(g[:, :, :past] for g in dgist)
    return cpu.folded_backward(arguments, gather, grad_out, *saved), composed, (dk, dv)


def check(tensors, intervals, gather, dtype):
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    ours, composed, alone = folded_and_composed(rounded, intervals, gather)
    # what no sum of gathered rows reaches: the very bits of the backward without them
    assert torch.equal(ours[0], composed[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[3:], composed[3:], strict=True))
    listed = torch.zeros(len(gather), rounded["k"].shape[2] + 1).scatter(1, gather + 1, 1.0)[:, 1:].bool()
    for found, wanted in zip(ours[1:3], alone, strict=True):
        keep = ~listed[:, None, :, None]
        assert torch.equal(found * keep, wanted * keep)
    exact = oracle({name: t.double() for name, t in rounded.items()}, intervals, gather, torch.float64)
    plain = oracle(rounded, intervals, gather, dtype)
    size = {name: t.abs().sum(-1).max().item() if t.numel() else 0.0 for name, t in tensors.items()}
    cancelled = size["grad_out"] * max(size["v"], size["past_v"]) * SCALE
    for name, found, *rest in zip(NAMES, ours, exact, plain, strict=True):
        assert found.shape == rest[0].shape
        assert_within_budget(name, found, *rest, factor=3.0, cancelled=cancelled)


@given(
    *(st.integers(1, 3), st.integers(1, 70), st.integers(0, 5), st.integers(0, 30), st.integers(0, 9)),
    *(st.sampled_from([1, 3]), st.sampled_from([1, 16, 24]), st.sampled_from(TYPES), st.integers(0, 999)),
)
def test_any_call_is_within_the_budget(batch, rows, past, width, tail, group, dim, dtype, seed):
    torch.manual_seed(seed)
    check(*hostile_call(batch, rows, past, width, tail, group, dim), dtype)


@given(layouts(), st.sampled_from(TYPES))
def test_any_layout_is_within_the_budget(layout, dtype):
    """Decoding rows included, whose forward is another kernel."""
    inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64)
    none = inputs.k[:, :, :0]
    past = (none, none) if inputs.past_key is None else (inputs.past_key, inputs.past_value)
    names = ("q", "k", "v", "past_k", "past_v", "grad_out")
    given = (inputs.q, inputs.k, inputs.v, *past, inputs.grad_out)
    tensors = {name: t.detach() for name, t in zip(names, given, strict=True)}
    check(tensors, (layout.gist_begin, layout.gist_end, layout.local_begin), layout.gather, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sums_of_many_chunks_are_the_same_on_any_number_of_threads(dtype, request):
    """A token that is listed again and again, too, and gather lists of any strides."""
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    layout = GistLayout.from_segments([150] * 8, 4, tail=60)
    gather = layout.gather.clone()
    gather[:, 5:20] = gather[:, 5:6]
    tensors, _, _ = hostile_call(1, layout.num_rows, 0, layout.gather.shape[1], 0, 2, 24)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    intervals = layout.gist_begin, layout.gist_end, layout.local_begin
    check(tensors, intervals, gather, dtype)
    results = []
    for threads, listed in ((1, gather), (2, gather.repeat_interleave(2, 1)[:, ::2]), (3, gather)):
        torch.set_num_threads(threads)
        results.append(folded_and_composed(tensors, intervals, listed)[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


WRONG = {
    "beyond": (lambda gather: gather + 12, "gather leaves the local rows"),
    "negative": (lambda gather: gather - 9, "gather leaves the local rows"),
    "type": (lambda gather: gather.int(), "gather must be Long"),
    "samples": (lambda gather: gather[:1], r"gather must be \[2, 6\], got \[1, 6\]"),
    "width": (lambda gather: gather.repeat(1, 2), "lists 12 rows a sample, but there are 8 compact rows"),
    "dims": (lambda gather: gather[0], "gather must have 2 dimensions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_gather_list_is_refused(case):
    spoil, message = WRONG[case]
    tensors, intervals, gather = hostile_call(2, 9, 2, 6, 3, 1, 8)
    q, k, v, past_k, past_v, grad_out = (t.float() for t in tensors.values())
    arguments = AttentionArguments(q, k, v, *compact(k, v, past_k, past_v, gather), *intervals, SCALE)
    saved = cpu.forward(arguments)
    with pytest.raises(RuntimeError, match=message):
        cpu.folded_backward(arguments, spoil(gather), grad_out, *saved)
