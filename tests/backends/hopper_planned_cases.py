"""Hopper's forward as a planned call, over a stub of the driver. test_planned.py runs this in its own process."""

# ruff: noqa: E402 (the stub comes before Triton)

import pytest
import torch

from bench.measured import stub

stub.activate()

from gistkern import GistLayout, gist_attention
from gistkern.backends import hopper, triton_plan
from gistkern.kernels import configs
from gistkern.testing import make_inputs


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(triton_plan, "_known", {})
    monkeypatch.setenv(hopper.ENVIRONMENT, "auto")
    monkeypatch.setitem(configs.HOPPER, ("fwd", 64), configs.HopperConfig(64, 2, True, "test"))
    layout = GistLayout.from_segments([60], 8, tail=20)
    inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    return layout, tuple(leaf.detach() for leaf in (inputs.q, inputs.k, inputs.v))


def attend(case, *given):
    layout, tensors = case
    before = stub.launches()
    gist_attention(*(given or tensors), layout, return_lse=True, backend="triton")
    return stub.launches() - before, layout.__dict__["_plan"].again.__self__._forward


def test_the_extension_makes_the_maps_from_the_second_call_on(case):
    for _ in range(2):
        launches, planned = attend(case)
        assert launches == 3, "compaction, the table of work, attention"
        assert planned.hopper is not None
    call = planned.calls[True]
    assert call is not None
    before = stub.launches()
    assert len(call.run(call.description, case[1])) == 4
    assert stub.launches() == before + 3


def test_what_stands_askew_goes_to_the_plain_kernels(case, monkeypatch):
    q, k, v = case[1]
    askew = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    _, planned = attend(case)
    assert planned.hopper is not None
    launches, planned = attend(case, q, askew, v)
    assert launches == 2
    assert planned.hopper is None
    monkeypatch.setenv(hopper.ENVIRONMENT, "always")
    monkeypatch.setattr(triton_plan, "_known", {})
    case[0].__dict__.pop("_plan")
    case[0].__dict__.pop("_plans")
    with pytest.raises(RuntimeError, match="need rows that lie dense"):
        attend(case, q, askew, v)
