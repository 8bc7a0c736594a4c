"""Launches of Hopper's kernels over a stub of the driver. test_hopper_launches.py runs this in its own process."""

# ruff: noqa: E402 (the stub comes before Triton)

import pytest
import torch

from bench.measured import stub

stub.activate()

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gistkern import GistLayout, gist_attention
from gistkern.backends import triton_plan
from gistkern.backends.hopper import MappedSteps
from gistkern.backends.hopper_backward import HopperBackward
from gistkern.backends.launcher import kernel_parameters, prepare
from gistkern.kernels.arguments import AttentionArguments
from gistkern.testing import make_inputs

WORK, DQ, GIST, LOCAL, FOLD = range(5)


def flat(values):
    """The tensors behind a kernel's arguments, in order."""
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        elif isinstance(value, TensorDescriptor):
            yield value.base
        elif isinstance(value, torch.Tensor):
            yield value


@pytest.fixture(scope="module")
def backward():
    """A backward over rows before heads, launched once: its kernels with grids and arguments."""
    batch, heads, kv_heads, rows, gists, dim = 2, 8, 2, 300, 24, 128

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.zeros(batch, *shape, dtype=dtype)

    q, grad_out = (tensor(rows, heads, dim).transpose(1, 2) for _ in range(2))
    out, dq = (tensor(heads, rows, dim) for _ in range(2))
    k, v = (tensor(rows, kv_heads, dim).transpose(1, 2) for _ in range(2))
    dk, dv = (tensor(kv_heads, rows, dim) for _ in range(2))
    gist_k, gist_v = (tensor(kv_heads, gists, dim) for _ in range(2))
    lse = tensor(heads, rows, dtype=torch.float32)
    rule = tuple(tensor(rows, dtype=torch.int32) for _ in range(3))
    made = HopperBackward(AttentionArguments(q, k, v, gist_k, gist_v, *rule, 0.1), 0)
    steps = made.steps(q.device, (*rule, tensor(gists, dtype=torch.int64)))
    given = grad_out, q, k, v, gist_k, gist_v, out, lse, dq, dk, dv, dk, dv
    steps.run(given)
    return made.launches, steps.kernels(steps.arguments(given, steps.workspace(q.device)))


@pytest.mark.parametrize("number", [DQ, GIST, LOCAL], ids=["dq", "gist", "local"])
def test_the_driver_is_given_what_triton_gives_it(backward, number):
    """Grid, block, shared memory, and the bytes of all parameters, tensor maps among them."""
    launches, kernels = backward
    kernel, grid, values = kernels[number]
    taken = kernel_parameters(kernel.asm["cubin"], kernel.metadata.name)
    stub.record(kernel.function, [parameter.size for parameter in taken])
    launches[number](torch.device("cpu"), *values[: len(values) - len(launches[number].rest)])
    by_triton = stub.last()
    prepare(kernel, grid, values)(*flat(values))
    by_us = stub.last()
    stub.record(0, [])  # it knows functions by name, and the other tests' take other parameters
    assert [parameter.size for parameter in taken].count(128) == {DQ: 8, GIST: 5, LOCAL: 7}[number]
    for theirs, ours in zip(by_triton.parameters, by_us.parameters, strict=True):
        if len(theirs) == 128:  # one bit, which Triton 3.6 leaves as the driver made it
            theirs, ours = (part[:8] + part[16:] for part in (theirs, ours))
        assert ours == theirs
    assert by_us == by_triton._replace(parameters=by_us.parameters)
    assert by_us.grid == grid
    assert by_us.block == (12 * 32, 1, 1)


@pytest.fixture
def planned(monkeypatch):
    """A layout and its inputs, whose calls Hopper's kernels serve."""
    monkeypatch.setenv("GISTKERN_HOPPER", "always")
    monkeypatch.setattr(triton_plan, "_known", {})
    layout = GistLayout.from_segments([100], 8, tail=20)
    return layout, make_inputs(layout, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)


def test_a_planned_backward_is_one_call_of_the_extension(planned, monkeypatch):
    layout, inputs = planned
    leaves, runs, run = (inputs.q, inputs.k, inputs.v), [], MappedSteps.run
    monkeypatch.setattr(MappedSteps, "run", lambda steps, tensors: (runs.append(steps), run(steps, tensors)))
    launched = []
    for _ in range(4):
        out = gist_attention(*leaves, layout, backend="triton")
        runs.clear()
        before = stub.launches()
        torch.autograd.grad(out, leaves, inputs.grad_out)
        launched.append((stub.launches() - before, len(runs)))
    assert launched == [(5, 1), (5, 1), (5, 0), (5, 0)]


def test_gradients_at_an_odd_address_are_no_tensor_maps(planned):
    layout, inputs = planned
    leaves = inputs.q, inputs.k, inputs.v
    out = gist_attention(*leaves, layout, backend="triton")
    askew = torch.empty(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)
    for _ in range(3):
        torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"GISTKERN_HOPPER=always, but .* addresses and strides"):
            torch.autograd.grad(out, leaves, askew, retain_graph=True)
