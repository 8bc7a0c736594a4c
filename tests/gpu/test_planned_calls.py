"""Calls that the extension makes from the second of a kind on: on a GPU their results are those of the first.

Emulated launches are Python's at every call; there the tests say that calls repeat.
"""

import pytest
import torch
from emulation import EMULATED

from gistkern import GistLayout, gist_attention
from gistkern.backends import triton_plan
from gistkern.ops.attention import AttentionOptions, attend
from gistkern.testing import make_inputs

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": torch.float16}
LAYOUTS = {
    "segments": lambda: GistLayout.from_segments([20, 13], 3, tail=9),
    "past rows": lambda: GistLayout.from_segments([20], 3, tail=9, past=5),
    "past rows alone": lambda: GistLayout.from_segments([], 1, tail=21, past=5),
    "a decode step": lambda: GistLayout.decode(6, 9),
}


def tensors_of(layout, seed):
    torch.manual_seed(seed)
    inputs = make_inputs(layout, **SIZES)
    past = {"past_key": inputs.past_key, "past_value": inputs.past_value} if layout.past else {}
    return inputs, past


def both(inputs, past, layout):
    """Output, LSE and gradients."""
    out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, backend="triton", return_lse=True, **past)
    return out, lse, *torch.autograd.grad(out, list(inputs.leaves().values()), inputs.grad_out)


def alone(inputs, past, layout):
    """The output without gradients."""
    with torch.no_grad():
        return (gist_attention(inputs.q, inputs.k, inputs.v, layout, backend="triton", **past),)


@pytest.mark.parametrize("call", [both, alone])
@pytest.mark.parametrize("name", LAYOUTS)
def test_later_calls_are_like_first_ones(name, call, device, small_tiles, monkeypatch):
    """Of tensors of their own, and of another layout with tensors of the same shapes."""
    layout, seeds = LAYOUTS[name]().to(device), range(2 if EMULATED else 4)
    cases = [tensors_of(layout, seed) for seed in seeds]
    later = [call(*case, layout) for case in cases]
    other = LAYOUTS[name]().to(device)
    later.append(call(*cases[0], other))
    monkeypatch.setattr(triton_plan, "_known", {})
    for case, found in zip([*cases, cases[0]], later, strict=True):
        first = call(*case, LAYOUTS[name]().to(device))
        assert all(torch.equal(one, same) for one, same in zip(found, first, strict=True))


@torch.no_grad()
def test_rows_go_to_their_room_at_later_calls_too(device, small_tiles):
    layout = LAYOUTS["past rows"]().to(device)
    for seed in range(2 if EMULATED else 4):
        inputs, past = tensors_of(layout, seed)
        expected = attend(inputs.q, inputs.k, inputs.v, layout, AttentionOptions(backend="triton"), **past)
        room = tuple(torch.cat([rows, torch.full_like(rows, 7)], 2) for rows in past.values())
        rows = {key: buffer[:, :, :5] for key, buffer in zip(past, room, strict=True)}
        found = attend(inputs.q, inputs.k, inputs.v, layout, AttentionOptions(backend="triton"), **rows, room=room)
        assert found[2].data_ptr() == room[0].data_ptr()
        assert all(torch.equal(one, same) for one, same in zip(found, expected, strict=True))


@torch.no_grad()
@pytest.mark.skipif(EMULATED, reason="captures a CUDA graph, which takes a GPU")
def test_a_cuda_graph_replays_a_planned_call(device):
    layout = LAYOUTS["segments"]().to(device)
    inputs, _ = tensors_of(layout, 0)
    q, k, v = inputs.q.detach(), inputs.k.detach(), inputs.v.detach()
    for _ in range(3):
        gist_attention(q, k, v, layout, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gist_attention(q, k, v, layout, backend="triton")
    for seed in (1, 2):
        torch.manual_seed(seed)
        for tensor in (q, k, v):
            tensor.normal_()
        graph.replay()
        assert torch.equal(out, gist_attention(q, k, v, layout, backend="triton"))
