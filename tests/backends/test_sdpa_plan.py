"""The CPU plan covers every row once and never builds anything of the size of rows x keys."""

import pytest
import torch
from hypothesis import given
from strategies import layouts

from gistkern import GistLayout
from gistkern.backends.sdpa_plan import TILE_ROWS, plan


def blocks_of(layout):
    return plan((layout.gist_begin, layout.gist_end, layout.local_begin), layout.num_local)


@given(layouts())
def test_every_real_row_is_in_one_block(layout):
    count = torch.zeros(layout.batch_size, layout.num_rows, dtype=torch.int)
    for block in blocks_of(layout):
        count[block.batch, block.begin : block.end] += 1
    assert torch.equal(count, layout.is_real().int())


@given(layouts())
def test_masked_blocks_are_one_tile_high(layout):
    assert all(block.end - block.begin <= TILE_ROWS for block in blocks_of(layout) if block.masked)


def test_equal_independent_segments_become_one_block():
    layout = GistLayout.hierarchical([96] * 40, 8, 10, tail=5, sink_tokens=0)
    first, *rest = blocks_of(layout)
    assert (first.repeat, first.begin, first.end) == (40, 0, 40 * 104)
    assert len(rest) == 1, "the summary and the tail share one tile"


@pytest.mark.parametrize("rows", [1000, 4000, 16000])
def test_blocks_and_mask_cells_grow_linearly(rows):
    """A sliding window's masks hold at most rows x (window + tile + gists) cells."""
    layout = GistLayout.sliding(rows, window=128, stride=500)
    blocks = blocks_of(layout)
    cells = sum((b.end - b.begin) * (b.gist_end - b.gist_begin + b.end - b.local_begin) for b in blocks if b.masked)
    assert len(blocks) <= rows // TILE_ROWS + 2
    assert cells <= rows * (128 + TILE_ROWS + rows // 500)
