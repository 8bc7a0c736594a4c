"""Torch's own causal attention: its results on the CPU, and when the table chooses it (fake CUDA tensors)."""

import pytest
import torch
from plain_cases import check
from torch._subclasses import FakeTensorMode

from gistkern import GistLayout, backends
from gistkern.backends import plain
from gistkern.testing import make_inputs

SHAPE = (1, 4, 1024, 64)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Function (dtype, shape) -> a query tensor that says it is on a GPU, one that has everything."""
    monkeypatch.setattr(backends, "_has_flash", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    torch.use_deterministic_algorithms(False)  # conftest.py turns it on for every test
    with FakeTensorMode():
        yield lambda dtype=torch.bfloat16, shape=SHAPE: torch.empty(shape, dtype=dtype, device="cuda:0")


def test_layouts_that_hide_nothing_go_to_torch(on_a_gpu):
    q = on_a_gpu()
    assert backends.choose("auto", q, gradient=True, plain=True) == "torch"
    assert backends.choose("torch", q, plain=True) == "torch"
    assert backends.choose("triton", q, plain=True) == "triton", "the one argument that keeps the reproducible path"


REFUSED = {
    "layout": ({"plain": False}, {}, "serves layouts that hide nothing"),
    "lse": ({"lse": True}, {}, "hands back no log-sum-exp"),
    "sinks": ({"sinks": True}, {}, "takes no learned sinks"),
    "fp32": ({}, {"dtype": torch.float32}, "computes float16 and bfloat16, not torch.float32"),
    "head_dim": ({}, {"shape": (1, 1, 16, 200)}, "head dimensions up to 192, got 200"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_calls_keep_their_kernels(case, on_a_gpu):
    wanted, tensor, message = REFUSED[case]
    q, wanted = on_a_gpu(**tensor), {"plain": True} | wanted
    assert backends.choose("auto", q, gradient=True, **wanted) == "triton"
    with pytest.raises(RuntimeError, match=f"backend 'torch' .*{message}"):
        backends.choose("torch", q, **wanted)


def test_reproducible_runs_keep_the_reproducible_kernels(on_a_gpu):
    torch.use_deterministic_algorithms(True)
    assert backends.choose("auto", on_a_gpu(), plain=True, gradient=True) == "triton"
    with pytest.raises(RuntimeError, match="may differ from run to run"):
        backends.choose("torch", on_a_gpu(), plain=True)


@pytest.mark.parametrize("reason", ["flash kernel", "a chip"])
def test_torch_without_its_flash_kernel_would_form_the_matrix(reason, on_a_gpu, monkeypatch):
    if reason == "a chip":
        monkeypatch.setattr(backends, "_has_flash", lambda device: False)
    else:
        monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert backends.choose("auto", on_a_gpu(), plain=True, gradient=True) == "triton"
    with pytest.raises(RuntimeError, match=f"needs .*{reason}"):
        backends.choose("torch", on_a_gpu(), plain=True)


def test_on_a_cpu_it_is_refused_by_name():
    layout = GistLayout.from_segments([5], 2)
    inputs = make_inputs(layout, dtype=torch.bfloat16)
    assert backends.choose("auto", inputs.q, plain=True) != "torch"
    with pytest.raises(RuntimeError, match="serves CUDA and ROCm tensors, got cpu"):
        backends.choose("torch", inputs.q, plain=layout.plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads", "groups"])
def test_it_computes_what_the_reference_does(dtype, strided, kv_heads):
    check("cpu", dtype=dtype, kv_heads=kv_heads, strided=strided)


def test_autocast_changes_no_dtype():
    q = torch.randn(1, 2, 9, 16)
    wanted = plain.attend(q, q, q, scale=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain.attend(q, q, q, scale=0.25), wanted)
