"""Launches by address over a stub of the driver, beside Triton's own. test_prepared.py runs this in its own process."""

# ruff: noqa: E402 (the stub comes before Triton)

import copy
from itertools import pairwise

import pytest
import torch

from bench.measured import stub

stub.activate()

from triton import knobs

from bench.measured.host import COUNTS, cases, counted
from gistkern import GistLayout, gist_attention
from gistkern.backends import triton_plan
from gistkern.backends.hopper import MappedSteps
from gistkern.backends.launcher import kernel_parameters
from gistkern.kernels.launch import Launch, Steps
from gistkern.ops.attention import AttentionOptions, attend
from gistkern.testing import make_inputs

_address = torch.Tensor.data_ptr
ONE = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16}
CASES = {
    "a segment and its tail": (GistLayout.from_segments([100], 8, tail=20), ONE),
    "samples with sinks and fillers": (
        GistLayout.stack(
            [GistLayout.sliding(90, 16, 8, gists=2), GistLayout.from_segments([30], 2, tail=9, sink_tokens=2)]
        ),
        ONE,
    ),
    "past rows": (GistLayout.from_segments([40], 4, tail=5, past=6), ONE),
    "past rows with room behind": (GistLayout.from_segments([40], 4, tail=5, past=6), ONE),
    "past rows alone": (GistLayout.from_segments([], 1, tail=40, past=6), ONE),
    "no compact rows": (GistLayout.from_segments([], 1, tail=40), ONE),
    "fp32, padded heads": (GistLayout.from_segments([100], 8, tail=20), ONE | {"head_dim": 80, "dtype": torch.float32}),
    "one head each": (GistLayout.from_segments([100], 8, tail=20), ONE | {"kv_heads": 4, "head_dim": 128}),
    "rows before heads, 24 wide": (GistLayout.from_segments([33], 3, tail=20), ONE | {"head_dim": 24}),
    "a decode step": (GistLayout.decode(10, 16), ONE),
    "a split decode step": (GistLayout.decode(3000, 16), ONE),
}
# of a head's width that they serve, and more rows than decoding has
BY_HOPPERS_KERNELS = [
    *("a segment and its tail", "samples with sinks and fillers", "past rows", "past rows with room behind"),
    *("past rows alone", "no compact rows", "one head each"),
]


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """Of calls like these, from other tests."""
    monkeypatch.setattr(triton_plan, "_known", {})


@pytest.fixture
def by_triton(monkeypatch):
    """Names of the kernels that went through Triton's front end."""
    names = []
    call = Launch.__call__

    def noted(self, *arguments):
        names.append(self.kernel.__name__)
        call(self, *arguments)

    monkeypatch.setattr(Launch, "__call__", noted)
    return names


def run_in_room(layout, inputs):
    """The call that writes its compact rows behind the past ones."""
    q, k, v, *past = (leaf.detach() for leaf in inputs.leaves().values())
    room = [torch.cat([rows, rows], 2) for rows in past]
    rows = dict(zip(("past_key", "past_value"), (buffer[:, :, : layout.past] for buffer in room), strict=True))
    found = attend(q, k, v, layout, AttentionOptions(backend="triton"), **rows, room=tuple(room))
    assert found[2].data_ptr() == room[0].data_ptr()


def run(layout, inputs, grad=None):
    past = {"past_key": inputs.past_key, "past_value": inputs.past_value} if layout.past else {}
    out = gist_attention(inputs.q, inputs.k, inputs.v, layout, backend="triton", **past)
    if out.requires_grad:
        torch.autograd.grad(out, list(inputs.leaves().values()), inputs.grad_out if grad is None else grad)


@pytest.mark.parametrize("name", CASES)
def test_the_driver_is_given_what_triton_gives_it(name, monkeypatch):
    """Function, grid, block, shared memory, and the bytes of all parameters, of the sizes that the cubin says."""
    layout, sizes = copy.copy(CASES[name][0]), CASES[name][1]  # without plans
    compared = []

    def both_ways(steps, tensors):
        work = steps.workspace(tensors[0].device)
        everything = steps.arguments(tensors, work)
        assert steps._prepare(tensors, work)
        by_address = steps.buffers_of(*map(_address, everything))
        for number, ((launch, _), buffers) in enumerate(
            zip(steps.launches, steps.buffers_of(*everything), strict=True)
        ):
            kernel = launch.kernel.warmup(*buffers, *launch.numbers, grid=(1,), **launch._options())
            parameters = kernel_parameters(kernel.asm["cubin"], kernel.metadata.name)
            kernel.run  # noqa: B018 - loads the code
            stub.record(kernel.function, [parameter.size for parameter in parameters])
            launch(tensors[0].device, *buffers)
            expected = stub.last()
            everyone, steps._prepared = steps._prepared, steps._prepared[number : number + 1]
            steps._run_prepared(by_address[number : number + 1])
            steps._prepared = everyone
            assert stub.last() == expected
            assert sum(map(len, expected.parameters)) > 0
            compared.append(launch.kernel.__name__)

    monkeypatch.setattr(Steps, "run", both_ways)
    inputs = make_inputs(layout, **sizes)
    if name.startswith("rows before heads"):
        for leaf in inputs.leaves().values():
            leaf.data = leaf.data.transpose(1, 2).contiguous().transpose(1, 2)
    if name.endswith("room behind"):
        run_in_room(layout, inputs)
        assert compared == ["gist_compact_kernel", "gist_attn_fwd_kernel"]
        return
    run(layout, inputs)
    run(layout, inputs, grad=torch.ones((), dtype=inputs.q.dtype).expand(inputs.q.shape))  # as of sum().backward()
    assert "gist_attn_bwd_dq_kernel" in compared
    assert ("gist_fold_kernel" in compared) == (layout.num_compact > 0)
    assert ("merge_splits_kernel" in compared) == (name == "a split decode step")


def noted(run, known):
    """Steps' way to run, that writes down whose and on what."""
    return lambda steps, tensors: (known.append((steps, tensors)), run(steps, tensors))


def cut(call, launches):
    """The description of a planned call with its first so many launches."""
    numbers, at = call.description.tolist(), 4
    for _ in range(numbers[2]):  # slots: kind, type, value, dims, sizes, strides
        at += 4 + 2 * numbers[at + 3]
    for _ in range(launches):
        at += 1 + numbers[at]
    return torch.tensor([*numbers[:3], launches, *numbers[4:at]])


def compare(call, steps, tensors, given, made):
    """That each launch of a planned call is that of the steps, with the results in the place of those `made`."""
    everything = steps.arguments(tensors, steps.workspace(tensors[0].device))
    mine = {tensor.data_ptr() for tensor in (*given, *steps.vectors)}
    new = {tensor.data_ptr(): tensor for tensor in everything if tensor.data_ptr() not in mine}
    names, seen = [], set()
    for number, (kernel, _, _) in enumerate(steps.kernels(everything)):
        parameters = kernel_parameters(kernel.asm["cubin"], kernel.metadata.name)
        stub.record(kernel.function, [parameter.size for parameter in parameters])
        (launch, _), buffers = steps.launches[number], steps.buffers_of(*everything)[number]
        launch(tensors[0].device, *buffers)
        expected, before = stub.last(), stub.launches()
        results = call.run(cut(call, number + 1), given)
        assert stub.launches() == before + number + 1
        found = stub.last()
        assert found._replace(parameters=[]) == expected._replace(parameters=[])
        at = {}
        for theirs, ours in zip(expected.parameters, found.parameters, strict=True):
            if ours != theirs:  # an address, or what the stub has made of one: a tensor map
                assert ours[8:] == theirs[8:]
                address, other = (int.from_bytes(part[:8], "little") for part in (theirs, ours))
                assert address in new
                assert at.setdefault(address, other) == other
        assert len(set(at.values())) == len(at)
        spans = sorted((other, other + new[address].nbytes) for address, other in at.items())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(other % 16 == 0 for other in at.values())
        for result, tensor in zip(results, made, strict=True):
            assert at.get(tensor.data_ptr(), result.data_ptr()) == result.data_ptr()
            assert (result.shape, result.stride(), result.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        seen.update(at)
        names.append(launch.kernel.__name__)
    assert seen == set(new), "all that the steps write"
    return names


@pytest.mark.parametrize(
    ("name", "hopper"), [(name, "never") for name in CASES] + [(name, "always") for name in BY_HOPPERS_KERNELS]
)
def test_the_extension_gives_the_driver_what_triton_gives_it(name, hopper, monkeypatch):
    """Of forwards that hand back all that they make and of those that do not, and of backwards."""
    monkeypatch.setenv("GISTKERN_HOPPER", hopper)
    layout, sizes = copy.copy(CASES[name][0]), CASES[name][1]  # without plans
    known = []
    for kind in (Steps, MappedSteps):
        monkeypatch.setattr(kind, "run", noted(kind.run, known))
    inputs, in_room = make_inputs(layout, **sizes), name.endswith("room behind")
    call, launched = (run_in_room, 1) if in_room else (run, 2)
    call(layout, inputs)
    call(layout, inputs)
    assert len(known) == 2 * launched
    call(layout, inputs)
    assert len(known) == 2 * launched, "the third time, nothing is left to Python"
    plan = layout.__dict__["_plan"]
    launches, (steps, tensors) = plan.again.__self__, known[launched]
    given, made = tensors[: 5 if layout.past else 3], tensors[5 : 9 if plan.gathers else 7]
    if in_room:
        given, made = (*given, *made[2:]), made[:2]
    names = compare(launches._forward.calls[True], steps, tensors, given, made)
    assert ("merge_splits_kernel" in names) == (name == "a split decode step")
    assert ("sm90_gist_attn_fwd_kernel" in names) == (hopper == "always")
    if in_room:
        return
    launches._forward.run(tensors, whole=False)
    assert compare(launches._forward.calls[False], steps, tensors, given, made[:1]) == names
    steps, tensors = known[launched + 1]
    names = compare(launches._backward.call, steps, tensors, tensors[:8], tensors[8 : 13 if layout.past else 11])
    prefix = "sm90_" if hopper == "always" else ""
    assert f"{prefix}gist_attn_bwd_dq_kernel" in names
    assert ("gist_fold_kernel" in names) == (layout.num_compact > 0)


def test_what_is_known_of_calls_is_known_of_one_choice_of_kernels(monkeypatch):
    for choice in ("never", "always", "never"):
        monkeypatch.setenv("GISTKERN_HOPPER", choice)
        layout = GistLayout.from_segments([100], 8, tail=20)
        inputs = make_inputs(layout, **ONE)
        for _ in range(3):
            gist_attention(inputs.q.detach(), inputs.k.detach(), inputs.v.detach(), layout, backend="triton")
            assert stub.last().name.startswith("sm90_") == (choice == "always")


def test_only_aligned_tensors_are_launched_by_address(by_triton):
    layout = GistLayout.from_segments([100], 8, tail=20)
    inputs = make_inputs(layout, **ONE)
    run(layout, inputs)
    assert not by_triton
    askew = torch.empty(inputs.k.numel() + 1, dtype=torch.bfloat16)[1:].view(inputs.k.shape)
    before = stub.launches()
    gist_attention(inputs.q.detach(), askew, inputs.v.detach(), layout, backend="triton")
    assert stub.launches() == before + 2
    assert by_triton == ["gist_compact_kernel", "gist_attn_fwd_kernel"]
    gist_attention(inputs.q.detach(), inputs.k.detach(), inputs.v.detach(), layout, backend="triton")
    assert stub.launches() == before + 4
    assert len(by_triton) == 2


def test_whoever_asks_triton_of_launches_hears_of_them(by_triton):
    layout = GistLayout.from_segments([100], 8, tail=20)
    inputs = make_inputs(layout, **ONE)
    run(layout, inputs)
    heard = []
    hook = lambda metadata: heard.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        run(layout, inputs)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert heard == by_triton
    assert len(heard) == 6


@pytest.mark.parametrize("name", COUNTS)
def test_a_call_costs_so_many_calls(name, monkeypatch):
    """Exact with the versions of constraints.txt; another Python or torch may need fewer."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # conftest's poison
    found, known = counted(cases()[name]), COUNTS[name]
    assert found.python <= known.python
    assert found.c <= known.c
    assert found[2:] == known[2:]
