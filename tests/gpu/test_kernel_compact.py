"""The compaction kernel moves bits exactly; its gradient adds up repeated tokens without atomics."""

import pytest
import torch

from gistkern import GistLayout
from gistkern.backends import triton as backend
from gistkern.ops import library
from gistkern.ops.attention import AttentionOptions, attend
from gistkern.rows import compact, compact_backward
from gistkern.testing import make_inputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows(*shape, dtype, device):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("past", [0, 1, 23])
@pytest.mark.parametrize("head_dim", [16, 24, 128])
def test_rows_are_copied_bit_for_bit(dtype, past, head_dim, device, small_tiles):
    gather = torch.tensor([[3, 3, -1, 0, 39, 7, *range(20)], [-1] * 20 + [5] * 6], device=device)
    k = rows(2, 40, 3, head_dim, dtype=dtype, device=device).transpose(1, 2)
    v = rows(3, 2, 40, head_dim, dtype=dtype, device=device).transpose(0, 1)
    past_k = past_v = None
    if past:
        past_k = rows(2, 3, past, head_dim, dtype=dtype, device=device)
        past_v = rows(past, 2, 3, head_dim, dtype=dtype, device=device).permute(1, 2, 0, 3)
    ours = backend.compact(k, v, past_k, past_v, gather)
    filler = torch.cat([torch.zeros(2, past, dtype=torch.bool), (gather < 0).cpu()], 1)[:, None, :, None].to(device)
    for mine, plain in zip(ours, compact(k, v, past_k, past_v, gather), strict=True):
        assert torch.equal(mine, plain.masked_fill(filler, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("past", [0, 23])
@pytest.mark.parametrize("head_dim", [16, 24, 128])
def test_new_rows_are_written_behind_the_past_ones(dtype, past, head_dim, device, small_tiles):
    """By a plan, and by the function that views of a buffer are handed to; what stands before and behind stays."""
    document = GistLayout.from_segments([20, 9, 30], 7, tail=2, sink_tokens=0 if past else 2, past=past)
    layout = document.to(device)
    inputs = make_inputs(document, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype)
    given = [t.detach().to(device) for t in (inputs.q, inputs.k, inputs.v)]
    end, options = layout.num_compact, AttentionOptions(backend="triton")
    room = [torch.full((1, 2, end + 3, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
    past_rows = dict(zip(("past_key", "past_value"), (inputs.past_key, inputs.past_value), strict=True))
    for buffer, (name, old) in zip(room, list(past_rows.items()), strict=True):
        if past:
            buffer[:, :, :past] = old.detach().to(device)
            past_rows[name] = buffer[:, :, :past]
    expected = attend(*given, layout, options, **past_rows)
    found = attend(*given, layout, options, **past_rows, room=tuple(room))
    again = [torch.full_like(buffer, torch.nan) for buffer in room]
    backend.compact_into(*given[1:], layout.gather, *(buffer[:, :, past:end] for buffer in again))
    assert torch.equal(found[0], expected[0])
    for buffer, other, rows_found, rows_expected in zip(room, again, found[2:], expected[2:], strict=True):
        assert rows_found.data_ptr() == buffer.data_ptr()
        assert torch.equal(buffer[:, :, :end], rows_expected)
        assert torch.equal(other[:, :, past:end], rows_expected[:, :, past:])
        assert buffer[:, :, end:].isnan().all()
        assert other[:, :, end:].isnan().all()
        assert other[:, :, :past].isnan().all()


def test_keys_that_are_no_numbers_are_copied_too(device, small_tiles):
    k = torch.full((1, 1, 20, 16), torch.nan, device=device)
    k[:, :, ::2] = torch.inf
    ours, _ = backend.compact(k, k, None, None, torch.arange(20, device=device)[None])
    assert torch.equal(ours.view(torch.int32), k.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_adds_repeated_tokens(dtype, device, small_tiles):
    """Repeats within a tile, across tiles, and many of one token."""
    entries = torch.tensor([[5, 9, 5, -1, *range(10, 40), 5, 12, 39, *[0] * 5, 5]], device=device)
    grads = [rows(1, 2, entries.shape[1], 24, dtype=dtype, device=device) for _ in range(2)]
    grads[1] = grads[1].transpose(1, 2).contiguous().transpose(1, 2)
    for grad in grads:  # nobody sees a filler, so its gradient is zero
        grad[:, :, 3] = 0
    ours = backend.compact_backward(*grads, entries, 41)
    again = backend.compact_backward(*grads, entries, 41)
    exact = compact_backward(*(g.double() for g in grads), entries, 41)
    plain = compact_backward(*grads, entries, 41)
    for mine, second, reference, cpu in zip(ours, again, exact, plain, strict=True):
        assert torch.equal(mine, second)
        error = (mine.double() - reference).abs().max()
        scale = reference.abs().max() * torch.finfo(dtype).eps
        assert error <= 2 * (cpu.double() - reference).abs().max() + scale
        untouched = torch.ones(41, dtype=torch.bool, device=device)
        untouched[entries.clamp(min=0)] = False
        assert (mine[:, :, untouched] == 0).all()


def test_an_overflowed_gradient_stays_in_its_row(device, small_tiles):
    entries = torch.arange(20, device=device)[None]
    grad = torch.ones(1, 1, 20, 16, device=device)
    grad[0, 0, 3, 0] = torch.inf
    ours, _ = backend.compact_backward(grad, grad, entries, 20)
    assert torch.equal(ours, grad)


def test_opcheck(device, small_tiles):
    layout = GistLayout.from_segments([9, 7], 2, tail=3, past=4).to(device)
    k, v = (rows(1, 2, layout.num_local, 16, dtype=torch.float32, device=device).requires_grad_() for _ in range(2))
    past_k, past_v = (rows(1, 2, 4, 16, dtype=torch.float32, device=device).requires_grad_() for _ in range(2))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(library.compact, (k, v, past_k, past_v, layout.gather, "triton"), test_utils=tests)
    grads = [rows(1, 2, layout.gather.shape[1], 16, dtype=torch.float32, device=device) for _ in range(2)]
    torch.library.opcheck(
        library.compact_backward, (*grads, layout.gather, layout.num_local, "triton"), test_utils=tests
    )
