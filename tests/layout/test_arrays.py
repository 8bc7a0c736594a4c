"""The rule on numpy arrays is the rule on tensors: the same vectors, of the same types."""

import dataclasses

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gistkern.layout import positions
from gistkern.layout.schemes import from_roles


def rows_of(draw, batch, rows):
    return torch.tensor(
        draw(st.lists(st.lists(st.booleans(), min_size=rows, max_size=rows), min_size=batch, max_size=batch))
    )


@st.composite
def roles(draw):
    """Arguments of `from_roles`: any padding, packed documents or past rows."""
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    column, valid = torch.arange(rows), torch.zeros(batch, rows, dtype=torch.bool)
    for sample in range(batch):
        left = draw(st.integers(0, rows))
        valid[sample] = (column >= left) & (column < left + draw(st.integers(0, rows)))
    arguments = {"sink_tokens": draw(st.integers(0, 4))}
    kind = draw(st.sampled_from(["fresh", "documents", "past", "starts"]))
    if kind == "documents":
        arguments["documents"] = rows_of(draw, batch, rows)
    elif kind == "past":
        counts = st.lists(st.integers(0, 9), min_size=batch, max_size=batch)
        arguments |= {"past": 9, "past_rows": torch.tensor(draw(counts)), "seen": torch.tensor(draw(counts))}
    elif kind == "starts":
        arguments["starts"] = rows_of(draw, batch, rows) & valid
    return rows_of(draw, batch, rows), valid, arguments


def same(found, expected):
    assert isinstance(found, np.ndarray)
    assert str(found.dtype) == str(expected.dtype).removeprefix("torch.")
    assert np.array_equal(found, expected.numpy())


@given(roles())
def test_layouts_of_arrays_are_those_of_tensors(given):
    is_gist, valid, arguments = given
    expected = from_roles(is_gist, valid, **arguments)
    arrays = {name: value.numpy() if torch.is_tensor(value) else value for name, value in arguments.items()}
    found = from_roles(is_gist.numpy(), valid.numpy(), **arrays)
    for field in dataclasses.fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if torch.is_tensor(other):
            same(one, other)
        else:
            assert one == other
    starts = valid & (expected.local_begin == torch.arange(valid.shape[1]))
    for restart in (False, True):
        apart = positions.gist_first(is_gist.numpy(), valid.numpy(), starts.numpy(), restart=restart)
        same(apart, positions.gist_first(is_gist, valid, starts, restart=restart))
