"""Counts, lengths, ids and scales that mean nothing, or that a number type cannot hold."""

from dataclasses import replace

import pytest
import torch

from gistkern import GistLayout, KeyValueRows, gist_compact
from gistkern.backends import native
from gistkern.rows import dequantize, quantize


def segments():
    return GistLayout.from_segments([6, 4], gists=2, tail=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GistLayout.from_segments([2.5], 1),
        lambda: GistLayout.from_segments([True], 1),
        lambda: GistLayout.from_segments([float("nan")], 1),
        lambda: GistLayout.from_segments(["3"], 1),
        lambda: GistLayout.from_segments([-1], 1),
        lambda: GistLayout.from_segments([10**12], 1),
        lambda: GistLayout.from_segments([3], [2.0]),
        lambda: GistLayout.from_segments([3], 1.5),
        lambda: GistLayout.from_segments(3, 1),
        lambda: GistLayout.from_segments([3], 1, past=2**31),
        lambda: GistLayout.from_segments([3], 1, sink_tokens=10**30),
        lambda: GistLayout.sliding(2**40, 4, 4),
        lambda: GistLayout.sliding(10, 4.0, 4),
        lambda: GistLayout.hierarchical([3, 0], 1, 1),
        lambda: GistLayout.hierarchical([3], 1.5, 1),
        lambda: GistLayout.decode(-1),
        lambda: GistLayout.decode(2**31),
        lambda: GistLayout.decode(torch.tensor([-3])),
        lambda: GistLayout.decode(torch.tensor([2.0])),
        lambda: GistLayout.decode(torch.tensor([2**40])),
        lambda: GistLayout.decode(torch.tensor([[2]])),
        lambda: GistLayout.decode(torch.tensor([], dtype=torch.int64)),
        lambda: GistLayout.decode(torch.tensor(3)),
        lambda: GistLayout.decode(3, rows=True),
        lambda: GistLayout.from_input_ids(torch.tensor([[1, 2]]), [1.5]),
        lambda: GistLayout.from_input_ids(torch.tensor([[1, 2]]), [2**70]),
        lambda: GistLayout.from_input_ids(torch.tensor([[1, 2]]), "9"),
        lambda: GistLayout.from_input_ids(torch.tensor([[1, 2]]), [9], torch.tensor([[1, float("nan")]])),
        lambda: GistLayout.from_input_ids(torch.tensor([[1, 2]]), [9], past=torch.tensor([True])),
        lambda: GistLayout.from_input_ids(torch.tensor([[1, 2]]), [9], past=torch.tensor([2**33])),
        lambda: segments().last_rows(2.0),
        lambda: replace(segments(), past=2**31),
        lambda: replace(segments(), gist_end=[[0]]),
        lambda: KeyValueRows(torch.zeros(3, 2, 0), torch.zeros(3, 2, 0)),
        lambda: KeyValueRows(torch.zeros(()), torch.zeros(())),
        lambda: KeyValueRows(*torch.zeros(2, 3, 2, 4).long()),
        lambda: KeyValueRows.empty(-1, kv_heads=1, head_dim=4),
        lambda: KeyValueRows.empty(2, kv_heads=1, head_dim=0),
    ],
)
def test_numbers_that_mean_nothing_are_refused(make):
    with pytest.raises(ValueError, match=r"must|needs|has fewer|are floats"):
        make()


def test_integers_of_other_libraries_are_integers():
    import numpy as np

    plain = GistLayout.from_segments([4, 3], [1, 2])
    for lengths, gists in ((np.array([4, 3]), np.array([1, 2])), (torch.tensor([4, 3]), torch.tensor([1, 2]))):
        assert torch.equal(GistLayout.from_segments(lengths, gists).token_mask(), plain.token_mask())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_whose_scale_is_subnormal_stay_finite(dtype):
    """The scale of such a row is rounded to a multiple of 2^-149, often by half of itself."""
    rows = torch.tensor(2.0**-149) * torch.arange(1, 2000)[:, None] * torch.tensor([1.0, -0.5])
    elements, scale = quantize(rows, dtype)
    assert dequantize(elements, scale, torch.float32).isfinite().all()
    assert (dequantize(elements, scale, torch.float32).abs() <= rows.abs() + 2.0**-149 * 448).all()
    if native.missing() is None:
        pool = KeyValueRows.empty(len(rows), kv_heads=1, head_dim=2, dtype=dtype)
        index = torch.arange(len(rows))[None]
        gist_compact(rows[None, None], rows[None, None], index, index, pool, backend="cpu")
        assert torch.equal(pool.key[:, 0].float(), elements.float())
        assert torch.equal(pool.key_scale[:, 0], scale)
