"""What surrounds the kernels: chunked sums, addresses beyond 2^31, precision, opcheck, compile, checkpointing."""

from dataclasses import replace

import pytest
import torch
from emulation import EMULATED, SANITIZED
from torch.utils.checkpoint import checkpoint

from gistkern import GistLayout, gist_attention
from gistkern.backends import triton_plan
from gistkern.kernels import attn_bwd_dkv, attn_bwd_dq, attn_fwd, decode, schedule
from gistkern.ops import attention, library
from gistkern.rows import gather_rows
from gistkern.testing import Inputs, compare, make_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("by_operators", [False, True], ids=["folded", "operators"])
@pytest.mark.slow
def test_gist_gradients_in_row_chunks(by_operators, dtype, device, small_tiles, monkeypatch):
    """Several chunks, some of them empty (late gists have short row intervals), add up to the same gradient."""
    monkeypatch.setattr(schedule, "MIN_CHUNK_ROWS", 8)
    monkeypatch.setattr(attention, "needs_operators", lambda *call: by_operators)
    chunks = []
    plan = attn_bwd_dkv.plan_gist_attn_bwd_dkv

    def noted(*arguments):
        launch, count = plan(*arguments)
        chunks.append(count)
        return launch, count

    for module in (attn_bwd_dkv, triton_plan):
        monkeypatch.setattr(module, "plan_gist_attn_bwd_dkv", noted)
    layout = GistLayout.from_segments([12, 9, 15, 11], 5, tail=7).to(device)
    compare(make_inputs(layout, dtype=dtype), layout, "triton")
    assert len(chunks) == 2
    assert max(chunks) > 1


@pytest.mark.skipif(SANITIZED, reason="a layout made by hand is read back from the device, which ttsem only pretends")
@pytest.mark.parametrize("past", [0, 5])
def test_a_token_listed_often_has_all_its_gradients(past, device, small_tiles, monkeypatch):
    """In the plan's backward: repeats, fillers and past rows, in chunks."""
    monkeypatch.setattr(schedule, "MIN_CHUNK_ROWS", 8)
    layout = GistLayout.from_segments([20, 11], 3, tail=12, sink_tokens=2, past=past)
    gather = torch.cat([layout.gather, layout.gather.new_tensor([[-1, 1, 1]])], 1)
    begin, end = layout.gist_begin.clone(), layout.gist_end.clone()
    begin[0, -6:], end[0, -6:] = layout.num_compact + 1, layout.num_compact + 2  # the last rows see the sink once more
    begin[0, -3:], end[0, -3:] = layout.num_compact + 2, layout.num_compact + 3
    layout = replace(layout, gist_begin=begin, gist_end=end, gather=gather)
    layout = layout.to(device)
    inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=24, dtype=torch.float16)
    compare(inputs, layout, "triton")


@pytest.mark.parametrize("negated", ["q", "k", "v"])
def test_negated_views_are_what_they_stand_for(negated, device, small_tiles):
    """Their memory holds the negative."""
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    found = []
    for view in (False, True):
        layout = GistLayout.from_segments([12, 9], 3, tail=12).to(device)
        inputs = make_inputs(layout, **sizes)
        given = {name: getattr(inputs, name).detach() for name in ("q", "k", "v")}
        if view:
            given[negated] = torch._neg_view(-given[negated])
        leaves = [tensor.requires_grad_() for tensor in given.values()]
        out = gist_attention(*leaves, layout, backend="triton")
        found.append((out, *torch.autograd.grad(out, leaves, inputs.grad_out)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(SANITIZED, reason="ttsem copies whole storages; this one has 5 GiB")
@pytest.mark.parametrize("rows", [40, 5], ids=["prefill", "decode"])
@pytest.mark.slow
def test_addresses_beyond_two_to_the_31(rows, device, small_tiles):
    """Row strides of 2^26 elements: the last rows lie past 2^31 elements of their tensors."""
    stride = 2**26 if rows == 40 else 2**29
    layout = (GistLayout.from_segments([15, 10], 3, tail=9) if rows == 40 else GistLayout.decode(6, 0, rows=5)).to(
        device
    )
    plain = make_inputs(layout, heads=1, kv_heads=1, head_dim=16, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = False  # only the touched pages are real
    try:
        storage = torch.empty((layout.num_rows - 1) * stride + 5 * 16, dtype=torch.float16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True

    def spread(tensor, offset):
        if tensor is None:
            return None
        view = storage[offset:].as_strided(tensor.shape, (0, 0, stride, 1))
        return view.copy_(tensor.detach()).requires_grad_()

    q, k, v = (spread(t, 16 * i) for i, t in enumerate((plain.q, plain.k, plain.v)))
    assert q.stride(2) * (layout.num_rows - 1) + q.storage_offset() >= 2**31
    compare(Inputs(q, k, v, plain.past_key, plain.past_value, plain.grad_out), layout, "triton")


def test_fp32_products_follow_torch_precision(device, small_tiles, monkeypatch):
    """With torch set to TF32 every kernel says so to Triton; by default they multiply in full fp32."""
    seen = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: (seen.append(kwargs["META"].PRECISION), self.kernel[grid](*args, **kwargs))

    for module, name in (
        (attn_fwd, "gist_attn_fwd_kernel"),
        (attn_bwd_dq, "gist_attn_bwd_dq_kernel"),
        (attn_bwd_dkv, "gist_attn_bwd_dkv_kernel"),
        (decode, "gist_decode_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    layout = GistLayout.from_segments([12], 2, tail=4).to(device)
    inputs = make_inputs(layout)
    one = GistLayout.decode(0, 3, device=device)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            out = gist_attention(inputs.q, inputs.k, inputs.v, layout, backend="triton")
            torch.autograd.grad(out, inputs.q, inputs.grad_out)
            step = make_inputs(one)
            gist_attention(step.q, step.k, step.v, one, backend="triton")
    finally:
        matmul.fp32_precision = before
    # forward, dq, dk/dv of gists, dk/dv of local rows, decode
    assert seen == ["ieee"] * 5 + ["tf32"] * 5


# it takes CPU tensors for CUDA ones; dynamo and the dispatcher ask what they really are
untraceable = pytest.mark.skipif(SANITIZED, reason="torch cannot trace the device that ttsem pretends")


@untraceable
@pytest.mark.slow
def test_opcheck(device, small_tiles):
    layout = GistLayout.from_segments([9, 7], 2, tail=3).to(device)
    inputs = make_inputs(layout, head_dim=16)
    compact = [gather_rows(t, layout.gather).detach().requires_grad_() for t in (inputs.k, inputs.v)]
    vectors = (layout.gist_begin, layout.gist_end, layout.local_begin)
    arguments = (inputs.q, inputs.k, inputs.v, *compact, *vectors, 0.25, "triton")
    torch.library.opcheck(library.attention, arguments)
    out, lse = (t.detach() for t in library.attention(*arguments))
    plain = [t.detach() for t in arguments[:5]]
    torch.library.opcheck(library.attention_backward, (inputs.grad_out, *plain, out, lse, *vectors, 0.25, "triton"))


@untraceable
@pytest.mark.slow
def test_compiles_as_one_graph(device, small_tiles):
    layout = GistLayout.from_segments([12, 9], 3, tail=6).to(device)
    inputs = make_inputs(layout)
    leaves = (inputs.q, inputs.k, inputs.v)

    def loss(q, k, v):
        return gist_attention(q * 2, k, v, layout, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@untraceable
def test_activation_checkpointing_changes_nothing(device, small_tiles):
    layout = GistLayout.from_segments([12, 9], 3, tail=6).to(device)
    inputs = make_inputs(layout)
    leaves = (inputs.q, inputs.k, inputs.v)

    def call(q, k, v):
        return gist_attention(q, k, v, layout, backend="triton")

    gradients = [
        torch.autograd.grad(out, leaves, inputs.grad_out)
        for out in (call(*leaves), checkpoint(call, *leaves, use_reentrant=False))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.skipif(EMULATED, reason="measures CUDA's own warning about synchronization")
def test_no_host_synchronization(device):
    layout = GistLayout.from_segments([300, 200], 8, tail=30).to(device)
    inputs = make_inputs(layout, dtype=torch.bfloat16)
    leaves = (inputs.q, inputs.k, inputs.v)

    def step():
        out = gist_attention(*leaves, layout, backend="triton")
        torch.autograd.grad(out, leaves, inputs.grad_out)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
