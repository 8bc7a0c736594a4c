"""Planned calls of the extension over a stub of the driver. test_planned.py runs this in its own process."""

# ruff: noqa: E402 (the stub comes before Triton)

import pytest
import torch

from bench.measured import stub

stub.activate()

from gistkern import GistLayout, gist_attention
from gistkern.backends import triton_plan
from gistkern.backends.planned import PlannedCall
from gistkern.kernels.launch import Steps
from gistkern.testing import make_inputs

VECTORS = "gist_begin", "gist_end", "local_begin", "gather"
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16}


def forward_of(layout):
    """What a layout's last plan knows of a forward."""
    return layout.__dict__["_plan"].again.__self__._forward


class Case:
    """A layout whose forward is planned, and tensors of the kind that it is planned for."""

    def __init__(self):
        self.layout = GistLayout.from_segments([100], 8, tail=20)
        inputs = make_inputs(self.layout, **SIZES)
        self.leaves = inputs.q, inputs.k, inputs.v
        self.given = tuple(leaf.detach() for leaf in self.leaves)
        self.grad = inputs.grad_out
        for _ in range(3):
            self.attend(*self.given, return_lse=True)
        self.whole: PlannedCall = forward_of(self.layout).calls[True]
        for _ in range(3):
            self.attend(*self.given)
        self.call: PlannedCall = forward_of(self.layout).calls[False]

    def attend(self, q, k, v, **options):
        return gist_attention(q, k, v, self.layout, backend="triton", **options)

    def both(self):
        return torch.autograd.grad(self.attend(*self.leaves), self.leaves, self.grad)


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(triton_plan, "_known", {})
    return Case()


@pytest.fixture
def by_steps(monkeypatch):
    """A list that grows by one with each forward or backward whose launches Python makes."""
    seen, run = [], Steps.run
    monkeypatch.setattr(Steps, "run", lambda steps, tensors: (seen.append(steps), run(steps, tensors)))
    return seen


def askew(tensor):
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


OTHERS = {
    "one less": lambda q, k, v: (q, k),
    "one more": lambda q, k, v: (q, k, v, v),
    "another type": lambda q, k, v: (q, k.half(), v),
    "another shape": lambda q, k, v: (q, k[:, :, :-1], v),
    "a dimension less": lambda q, k, v: (q, k[0], v),
    "other strides": lambda q, k, v: (q, k.transpose(1, 2).contiguous().transpose(1, 2), v),
    "askew": lambda q, k, v: (q, askew(k), v),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_launched_on_tensors_of_another_kind(case, name):
    assert len(case.whole.run(case.whole.description, case.given)) == 4
    assert len(case.call.run(case.call.description, case.given)) == 1
    before, others = stub.launches(), OTHERS[name](*case.given)
    assert case.call.run(case.call.description, others) == []
    if len(others) == 3:
        assert case.call.output(case.call.description, *others, None, None) is None
    assert case.call.output(case.call.description, *case.given, None, case.given[1]) is None
    with pytest.raises(RuntimeError, match="a plan of 4 results was run for 1"):
        case.whole.output(case.whole.description, *case.given, None, None)
    assert stub.launches() == before


def test_nothing_is_launched_on_tensors_of_another_device(case):
    before, (q, k, v) = stub.launches(), case.given
    numbers = case.call.description.clone()
    numbers[0] = 0
    assert case.call.run(numbers, case.given) == []
    for other in (k.to("meta"), k.to_sparse()):
        with pytest.raises(NotImplementedError):
            case.call.run(case.call.description, (q, other, v))
        with pytest.raises(NotImplementedError):
            case.call.output(case.call.description, q, other, v, None, None)
    assert stub.launches() == before


# a description's header (device, workspace, slots, launches) and first slot (kind, type, value, dims)
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, -2, "device"),
        (1, -1, "workspace of -1 bytes"),
        (2, 65, "up to 64 slots, not 65"),
        (2, -1, "up to 64 slots, not -1"),
        (3, 9, "up to 8 launches, not 9"),
        (3, 1, "longer than what it describes"),
        (4, 4, "of no known kind"),
        (4, -1, "of no known kind"),
        (5, -1, "has the element type -1"),
        (6, 0, "multiple of 0 bytes"),
        (7, 6, "has 6 dimensions"),
        (7, -1, "has -1 dimensions"),
    ],
)
def test_wrong_descriptions_are_refused(case, at, value, message):
    before, numbers = stub.launches(), case.call.description.clone()
    numbers[at] = value
    with pytest.raises(RuntimeError, match=message):
        case.call.run(numbers, case.given)
    assert stub.launches() == before


def slots_of(description):
    """Where each slot begins, by its kind."""
    found, at = {}, 4
    for _ in range(description[2]):
        found.setdefault(int(description[at]), []).append(at)
        at += 4 + 2 * int(description[at + 3])
    return found


@pytest.mark.parametrize(
    ("kind", "offset", "value", "message"),
    [
        (2, 4, -1, "a slot of -1 elements"),
        (2, 4, 2**50, "a slot of"),
        (2, 8, -5, "elements, -5 apart"),
        (3, 2, 8, "outside of the workspace"),
        (3, 2, -16, "outside of the workspace"),
        (3, 2, 2**40, "outside of the workspace"),
        (3, 4, 2**20, "outside of the workspace"),
        (3, 8, 2**40, "outside of the workspace"),
        (3, 8, 2**48, "larger than any memory"),
    ],
)
def test_memory_is_made_only_as_large_as_memory_is(case, kind, offset, value, message):
    numbers = case.call.description.clone()
    before, at = stub.launches(), slots_of(numbers)[kind][-1]
    if offset == 8:
        numbers[at + 4] = max(2, numbers[at + 4])
    numbers[at + offset] = value
    with pytest.raises(RuntimeError, match=message):
        case.call.run(numbers, case.given)
    assert stub.launches() == before


def test_every_cut_description_is_refused(case):
    whole, before = case.call.description, stub.launches()
    for length in range(len(whole)):
        with pytest.raises(RuntimeError, match=r"ends before what it describes|is not as long as"):
            case.call.run(whole[:length].clone(), case.given)
    for broken in (torch.cat((whole, whole[-1:])), whole.int(), whole[None], whole.repeat_interleave(2)[::2]):
        with pytest.raises(RuntimeError, match=r"longer than what it describes|must be an int64 vector on the CPU"):
            case.call.run(broken, case.given)
    assert stub.launches() == before


def test_a_wrong_launch_keeps_those_before_it_from_being_made(case):
    numbers, before = case.call.description.clone(), stub.launches()
    at = max(map(max, slots_of(numbers).values()))
    at += 4 + 2 * int(numbers[at + 3])  # behind the last slot
    at += 1 + int(numbers[at])  # behind the first launch
    numbers[at + 1 + 11] = 7  # behind the second one's header: what its first parameter is
    with pytest.raises(RuntimeError, match="of no known kind"):
        case.call.run(numbers, case.given)
    assert stub.launches() == before


def test_the_drivers_errors_have_their_names(case):
    stub.fail_next(1)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        case.attend(*case.given)
    case.attend(*case.given)


def test_a_third_call_leaves_nothing_to_python(case, by_steps):
    for options in ({}, {"return_lse": True}):
        for _ in range(3):
            case.attend(*case.given, **options)
        del by_steps[:]
        case.attend(*case.given, **options)
        assert not by_steps
    for _ in range(2):
        case.both()
    del by_steps[:]
    assert [grad.shape for grad in case.both()] == [leaf.shape for leaf in case.leaves]
    assert not by_steps


def test_what_is_known_of_one_layout_serves_others_on_their_own_vectors(case, by_steps):
    for _ in range(3):
        case.both()
    others = Case.__new__(Case)
    others.layout, others.leaves, others.grad = GistLayout.from_segments([90, 2], 4, tail=28), case.leaves, case.grad
    del by_steps[:]
    others.attend(*case.given)
    mine, theirs = ([getattr(one.layout, name).data_ptr() for name in VECTORS] for one in (others, case))
    seen = {int.from_bytes(part, "little") for part in recorded(others.layout, case.given)}
    assert seen >= set(mine[:3])
    assert not seen & set(theirs)
    others.both()
    assert not by_steps
    call = others.layout.__dict__["_plan"].again.__self__._backward.call
    assert [int(call.description[at]) for at in call.addresses] == mine
    assert all(one is getattr(others.layout, name) for one, name in zip(call.vectors, VECTORS, strict=True))
    case.attend(*case.given)
    assert {int.from_bytes(part, "little") for part in recorded(case.layout, case.given)} >= set(theirs[:3])
    for different in ({"scale": 0.5}, {"past_key": case.given[1][:, :, :0], "past_value": case.given[2][:, :, :0]}):
        del by_steps[:]
        others.attend(*case.given, **different)
        assert len(by_steps) == 1, different


@pytest.mark.parametrize("learns", [False, True])
def test_learned_sinks_are_counted_in(case, by_steps, learns):
    """Their plan is not that of calls without them."""
    tensors = case.leaves if learns else case.given
    sinks = torch.zeros(SIZES["heads"], requires_grad=learns)
    case.attend(*tensors)
    for _ in range(3):
        out, lse = case.attend(*tensors, learned_sinks=sinks, return_lse=True)
    del by_steps[:]
    out, lse = case.attend(*tensors, learned_sinks=sinks, return_lse=True)
    assert not by_steps
    assert (out.shape, lse.shape) == (tensors[0].shape, tensors[0].shape[:3])
    assert out.requires_grad == learns
    plan = case.layout.__dict__["_plan"]
    case.attend(*tensors, return_lse=True)
    assert case.layout.__dict__["_plan"] is not plan


def test_one_tensor_given_twice_is_two_tensors(case, by_steps):
    """A plan that was made for a call with k in the place of v."""
    layout, (q, k, v) = GistLayout.from_segments([100], 8, tail=20), case.given
    for _ in range(3):
        gist_attention(q, k, k, layout, backend="triton")
    del by_steps[:]
    for values in (k, v):
        gist_attention(q, k, values, layout, backend="triton")
        seen = [int.from_bytes(part, "little") for part in recorded(layout, (q, k, values))]
        assert {values.data_ptr(), k.data_ptr()} <= set(seen)
    assert not by_steps


def recorded(layout, given):
    """The parameters of the last launch of a call."""
    from gistkern.backends.launcher import kernel_parameters

    launches = forward_of(layout)
    kernel, call = launches.steps._kernels[-1], launches.calls[False]
    taken = kernel_parameters(kernel.asm["cubin"], kernel.metadata.name)
    stub.record(kernel.function, [parameter.size for parameter in taken])
    call.run(call.description, given)
    return stub.last().parameters


def test_what_a_tensor_says_of_itself_is_heeded(case, by_steps):
    """The negative that a view stands for is made; the kernels see the result."""
    q, k, v = case.given
    negative = torch._neg_view(k)
    case.attend(q, negative, v)
    assert k.data_ptr() not in [int.from_bytes(part, "little") for part in recorded(case.layout, (q, negative, v))]
    grad = torch._neg_view(case.grad)
    for _ in range(4):
        torch.autograd.grad(case.attend(*case.leaves), case.leaves, grad)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:, :, :-1], v),
        lambda q, k, v: (q[..., :-8], k, v),
        lambda q, k, v: (q, k.half(), v),
        lambda q, k, v: (q, k.to_sparse(), v),
        lambda q, k, v: (q, k.to("meta"), v),
        lambda q, k, v: (q, torch.nested.nested_tensor([k[0]]), v),
        lambda q, k, v: (q[0], k[0], v[0]),
    ],
    ids=["rows", "head_dim", "type", "sparse", "meta", "nested", "dimensions"],
)
def test_what_is_refused_is_refused_after_a_plan_too(case, change):
    before = stub.launches()
    with pytest.raises(ValueError, match=r"must be|is torch|has \d+ samples"):
        case.attend(*change(*case.given))
    with pytest.raises(ValueError, match="past_key and past_value go together"):
        case.attend(*case.given, past_key=case.given[1])
    with pytest.raises(ValueError, match="scale"):
        case.attend(*case.given, scale=-1.0)
    assert stub.launches() == before
    case.attend(*case.given)
    assert stub.launches() == before + 2


def test_other_tensors_are_served_by_other_plans(case):
    q, k, v = case.given
    plan = case.layout.__dict__["_plan"]
    for tensors in (
        (q, k.transpose(1, 2).contiguous().transpose(1, 2), v),
        (q.half(), k.half(), v.half()),
        (torch.cat([q, q], 1), k, v),
        case.leaves,
    ):
        before = stub.launches()
        case.attend(*tensors)
        assert stub.launches() == before + 2
        assert case.layout.__dict__["_plan"] is not plan
        case.attend(*case.given)
        assert case.layout.__dict__["_plan"] is plan


def test_a_layout_that_was_written_to_is_looked_at_again(case, by_steps):
    plan = case.layout.__dict__["_plan"]
    case.layout.local_begin.add_(0)
    case.attend(*case.given)
    assert case.layout.__dict__["_plan"] is not plan
    case.layout.gist_end[0, 0] = 5  # the first row sees gists that come after it
    before = stub.launches()
    with pytest.raises(ValueError, match="invalid GistLayout"):
        case.attend(*case.given)
    assert stub.launches() == before


def test_a_backward_runs_on_saved_tensors_that_lie_otherwise(case, by_steps):
    for _ in range(3):
        case.both()

    def moved(tensor):
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.dim() == 4 else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, moved):
        out = case.attend(*case.leaves)
    del by_steps[:]
    before = stub.launches()
    torch.autograd.grad(out, case.leaves, case.grad)
    assert stub.launches() == before + 4
    assert len(by_steps) == 1
    case.both()
    case.both()
    del by_steps[:]
    case.both()
    assert not by_steps
