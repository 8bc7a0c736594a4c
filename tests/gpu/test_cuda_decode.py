"""The extension's CUDA kernels: on a GPU, or emulated on a CPU (evidence.md); pooled decoding by Triton too."""

import os

import pytest
import torch
from emulation import EMULATED, SANITIZED
from pool_cases import CASES, E4M3, INT8, check, make_case, oracle

from gistkern import GistLayout, KeyValueRows, backends, gist_attention, gist_compact
from gistkern.backends import native, reference
from gistkern.ops import library
from gistkern.rows import compact
from gistkern.testing import FORWARD_FACTOR, assert_within_budget, compare, make_inputs

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture
def cuda(device):
    """The backend, or why it cannot run here."""
    if SANITIZED:
        pytest.skip("ttsem executes Triton's kernels only; `make sanitize` runs csrc/testing/suite.cpp for these")
    no_library = not native.library_path().is_file()
    if reason := backends.get("cuda").reason(torch.empty(1, 1, 1, 16, device=device)):
        # a library that was built for this and does not serve is a failure, not a reason to skip
        stop = pytest.fail if EMULATED and os.environ.get(native.LIBRARY) and not no_library else pytest.skip
        stop(f"backend 'cuda' {reason}")
    return device


@pytest.fixture(params=["simt", "tensor_core"])
def variant(request, monkeypatch):
    """Each kernel by itself, instead of the choice by shape."""
    monkeypatch.setitem(native.VARIANTS, "automatic", native.VARIANTS[request.param])
    return request.param


def serves(variant, dtype, head_dim):
    return variant == "simt" or (dtype in HALF and head_dim % 8 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees_with_the_oracle(name, dtype, variant, cuda):
    case = make_case(**CASES[name], dtype=dtype)
    if serves(variant, dtype, case.q.shape[-1]):
        check(case, "cuda", cuda)
    else:
        with pytest.raises(RuntimeError, match="gistkern: "):
            case.to(cuda).call("cuda")


@pytest.mark.parametrize("name", CASES)
def test_the_automatic_choice_serves_every_case(name, cuda):
    check(make_case(**CASES[name], dtype=torch.float16), "cuda", cuda)


@pytest.mark.parametrize("name", ["ragged", "paged-per-row", "int8-tail", "split", "no-gists"])
def test_triton_serves_pools_too(name, device):
    check(make_case(**CASES[name]), "triton", device)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_op_decodes(rows, dtype, cuda):
    """`gist_attention(backend="cuda")`: per-sample buffers, other strides, ragged and empty sequences."""
    layout = GistLayout.decode(torch.tensor([10, 0, 37]), torch.tensor([5, 20, 0]), rows=rows).to(cuda)
    inputs = make_inputs(layout, dtype=dtype)
    q, k, v, past_k, past_v = (
        t.detach().transpose(1, 2).contiguous().transpose(1, 2)
        for t in (inputs.q, inputs.k, inputs.v, inputs.past_key, inputs.past_value)
    )
    past = {"past_key": past_k, "past_value": past_v}
    out, lse = gist_attention(q, k, v, layout, **past, backend="cuda", return_lse=True)
    double = {name: t.double() for name, t in past.items()}
    exact = gist_attention(q.double(), k.double(), v.double(), layout, **double, backend="reference", return_lse=True)
    plain = reference.from_layout(q, k, v, layout, past=(past_k, past_v))
    for name, value, wanted, rough in zip(("out", "lse"), (out, lse), exact, plain, strict=True):
        assert_within_budget(name, value, wanted, rough, FORWARD_FACTOR)


def test_a_sequence_that_sees_nothing(cuda, variant):
    for documents in ((5, 0), (700, 0)):
        case = make_case(documents, ((0, 0), (1, 0)), dtype=torch.float16)
        case.tail_length[1] = 0
        out, lse = case.to(cuda).call("cuda")
        assert (out[1] == 0).all()
        assert (lse[1] == -torch.inf).all()
        wanted = oracle(case, torch.float64)
        torch.testing.assert_close(out[0].double().cpu(), wanted["out"][0], rtol=1e-2, atol=1e-2)


def test_two_runs_are_bit_identical(cuda, variant):
    case = make_case(**CASES["split"], dtype=torch.float16).to(cuda)
    assert all(torch.equal(a, b) for a, b in zip(case.call("cuda"), case.call("cuda"), strict=True))


@pytest.mark.skipif(EMULATED, reason="an emulated launch has ended when it returns")
def test_split_launches_side_by_side(cuda):
    """On two streams and from two replayed graphs: no launch counts another's arrivals."""
    cases = [
        make_case((9000,), ((0, 5),), kv_heads=2, heads=8, head_dim=128, dtype=torch.float16, seed=s).to(cuda)
        for s in (1, 2)
    ]
    wanted = [case.call("cuda") for case in cases]
    graphs = [torch.cuda.CUDAGraph() for _ in cases]
    replayed = []
    for graph, case in zip(graphs, cases, strict=True):
        with torch.cuda.graph(graph):
            replayed.append(case.call("cuda"))
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for stream, case, want in zip(streams[2:], cases, wanted, strict=True):
            with torch.cuda.stream(stream):
                found.append((case.call("cuda"), want))
    torch.cuda.synchronize()
    for have, want in (*found, *zip(replayed, wanted, strict=True)):
        assert all(map(torch.equal, have, want))


@pytest.mark.skipif(EMULATED, reason="captures a CUDA graph, which takes a GPU")
def test_a_cuda_graph_replays_the_call_with_new_lengths(cuda):
    """Lengths are read on the device: after the capture other documents and tails are decoded without a new plan."""
    case, other = (make_case(**CASES["split"], dtype=torch.float16, seed=seed).to(cuda) for seed in (0, 1))
    case.call("cuda")  # whatever happens once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = case.call("cuda")
    case.q.copy_(other.q)
    case.gist_end.sub_(1)
    graph.replay()
    wanted = case.call("cuda")
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])


@pytest.mark.parametrize("quantized", [None, INT8, E4M3], ids=str)
def test_compaction_equals_that_of_the_cpu(quantized, cuda):
    """Bit for bit, scales included: rows of a layer into a pool, some left out, one of zeros."""
    dtype = torch.bfloat16
    k, v = torch.randn(2, 2, 3, 9, 40).to(dtype)
    k[0, 1, 7] = 0.0
    gather = torch.tensor([[7, 8, -1, 2], [0, 0, 1, 8]])
    slot = torch.tensor([[3, 11, 5, -1], [0, 1, 2, 10]])
    pools = []
    for device, backend in (("cpu", "sdpa"), (cuda, "cuda")):
        pool = KeyValueRows.empty(12, kv_heads=3, head_dim=40, dtype=quantized or dtype, device=device)
        for tensor in pool.tensors():
            tensor.view(torch.uint8).zero_()
        gist_compact(*(t.to(device) for t in (k, v, gather, slot)), pool, backend=backend)
        pools.append(pool)
    for ours, wanted in zip(pools[1].tensors(), pools[0].tensors(), strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("head_dim", [7, 64, 136])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_op_compacts(dtype, head_dim, cuda):
    """Past rows, then gathered ones, a filler among them, bit for bit."""
    k, v = torch.randn(2, 2, 3, 9, head_dim).to(cuda, dtype)
    past = torch.randn(2, 2, 3, 4, head_dim).to(cuda, dtype)
    gather = torch.tensor([[7, 8, 2], [0, 0, -1]]).to(cuda)
    found = library.compact(k, v, *past, gather, "cuda")
    wanted = compact(k, v, *past, gather)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1, :, :-1], theirs[1, :, :-1])
        assert (ours[1, :, -1] == 0).all(), "a filler is zeros"


def test_gradients_of_the_keys_alone_are_refused_too(cuda):
    layout = GistLayout.decode(4, 0).to(cuda)
    inputs = make_inputs(layout)
    past = {"past_key": inputs.past_key, "past_value": inputs.past_value}
    with pytest.raises(RuntimeError, match="has no backward"):
        gist_attention(inputs.q.detach(), inputs.k, inputs.v, layout, **past, backend="cuda")
    assert backends.choose("auto", inputs.q, gradient=True) != "cuda"


def test_gradients_are_refused(cuda):
    layout = GistLayout.decode(4, 0).to(cuda)
    inputs = make_inputs(layout)
    past = {"past_key": inputs.past_key, "past_value": inputs.past_value}
    with pytest.raises(RuntimeError, match="has no backward"):
        gist_attention(inputs.q, inputs.k, inputs.v, layout, **past, backend="cuda")


def test_more_rows_are_refused(cuda):
    layout = GistLayout.decode(4, 0, rows=9).to(cuda)
    with pytest.raises(RuntimeError, match="up to 8 query rows a sequence, got 9"):
        compare(make_inputs(layout), layout, "cuda")
