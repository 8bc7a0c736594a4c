"""The decode kernel: few query rows per sequence over ragged gist rows and tails, unsplit and split."""

import pytest
import torch
from emulation import tiles

from gistkern import GistLayout, gist_attention
from gistkern.kernels import configs, decode, schedule
from gistkern.testing import compare, make_inputs


@pytest.fixture
def launches(monkeypatch):
    """Counts of decode launches and of merges, so that a test knows which path it took."""
    counts = {"decode": 0, "merge": 0}

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            counts[self.name] += 1
            return self.kernel[grid]

    monkeypatch.setattr(decode, "gist_decode_kernel", Counted(decode.gist_decode_kernel, "decode"))
    monkeypatch.setattr(decode, "merge_splits_kernel", Counted(decode.merge_splits_kernel, "merge"))
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, schedule.DECODE_ROWS])
def test_ragged_sequences(rows, dtype, device, launches):
    layout = GistLayout.decode(torch.tensor([10, 0, 37]), torch.tensor([5, 20, 0]), rows=rows).to(device)
    compare(make_inputs(layout, heads=4, kv_heads=2, dtype=dtype), layout, "triton")
    assert launches == {"decode": 1, "merge": 0}


def test_one_more_row_is_not_decoding(device, launches, small_tiles):
    layout = GistLayout.decode(10, 5, rows=schedule.DECODE_ROWS + 1).to(device)
    compare(make_inputs(layout), layout, "triton")
    assert launches["decode"] == 0


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (40, 1)], ids=str)
def test_head_groups(heads, device):
    layout = GistLayout.decode(torch.tensor([10, 21]), 4, rows=2).to(device)
    compare(make_inputs(layout, heads=heads[0], kv_heads=heads[1]), layout, "triton")


@pytest.mark.parametrize("past", [500, 600, 1100])
@pytest.mark.slow
def test_long_caches_are_split_and_merged(past, device, launches):
    """Ragged on purpose: the second sequence fills one split only, the third sees nothing but itself."""
    layout = GistLayout.decode(torch.tensor([past, 17, 0]), 3).to(device)
    compare(make_inputs(layout, heads=2, kv_heads=1, head_dim=16), layout, "triton")
    assert launches == {"decode": 1, "merge": past > schedule.UNSPLIT_COLUMNS}


@pytest.mark.parametrize("two_loops", [False, True], ids=["one-loop", "two-loops"])
@pytest.mark.slow
def test_splits_of_several_tiles(two_loops, device, launches):
    """A split ends within the columns that need no mask, and the last one at the last column."""
    layout = GistLayout.decode(torch.tensor([700, 690]), 9, rows=2).to(device)
    with configs.overridden(**tiles(16, 16, two_loops)):
        compare(make_inputs(layout, heads=2, kv_heads=1, head_dim=16), layout, "triton")
    assert launches == {"decode": 1, "merge": 1}


def test_a_sequence_that_sees_nothing(device):
    """Padding rows beside decoding ones: 0 and -inf, through both paths."""
    ids = torch.tensor([[1, 2, 3], [0, 0, 0]])
    for past in (5, 700):
        layout = GistLayout.from_input_ids(ids, [90], ids > 0, past=torch.tensor([past, 0])).to(device)
        inputs = make_inputs(layout, heads=2, kv_heads=1, head_dim=16)
        past_rows = {"past_key": inputs.past_key, "past_value": inputs.past_value}
        out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, **past_rows, backend="triton", return_lse=True)
        assert (out[1] == 0).all()
        assert (lse[1] == -torch.inf).all()
        assert lse[0].isfinite().all()


def test_decoding_agrees_with_the_forward_kernel(device, monkeypatch):
    """The same rows through both kernels: what training computes is what decoding computes."""
    layout = GistLayout.decode(40, 9, rows=4).to(device)
    inputs = make_inputs(layout, dtype=torch.float32)
    past = {"past_key": inputs.past_key, "past_value": inputs.past_value}
    results = []
    for limit in (schedule.DECODE_ROWS, 0):
        monkeypatch.setattr("gistkern.backends.triton.DECODE_ROWS", limit)
        with configs.overridden(**tiles(16, 16)):
            results.append(gist_attention(inputs.q, inputs.k, inputs.v, layout, **past, backend="triton"))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
