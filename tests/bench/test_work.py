"""The work counter counts what the kernels do: against the products they make in the interpreter, and by hand."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.counted import work
from gistkern import GistLayout
from gistkern.kernels.chips import chip_for

ROOT = Path(__file__).parents[2]

# run in a process of its own: kernels are interpreted there
COUNT_PRODUCTS = """
import torch
from gistkern import GistLayout, gist_attention
from gistkern.kernels import attn_bwd_dq, attn_fwd, configs, fold
from gistkern.kernels.chips import chip_for
from gistkern.testing import make_inputs
from triton.runtime.interpreter import InterpreterBuilder
from bench.counted import work

made, masked = [], []
create_dot, seen = InterpreterBuilder.create_dot, attn_fwd.seen_columns
InterpreterBuilder.create_dot = lambda self, a, b, *rest: (made.append(1), create_dot(self, a, b, *rest))[1]
attn_fwd.seen_columns = attn_bwd_dq.seen_columns = lambda *a: (masked.append(1), seen(*a))[1]


def uncounted(*arguments, multiply=fold.matmul):
    # repeated tokens are added up by products, which the schedule knows nothing of
    before = len(made)
    found = multiply(*arguments)
    del made[before:]
    return found


fold.matmul = uncounted
LAYOUTS = {
    "segments": GistLayout.from_segments([20, 17, 13], 3, tail=10),
    "sliding": GistLayout.sliding(60, 21, 8, gists=2),
    "hierarchical": GistLayout.hierarchical([11] * 4, 3, 5, tail=20),
    "past-and-tail": GistLayout.from_segments([20, 20], 4, tail=20, past=9).last_rows(33),
}
small = configs.Config(16, 16, 4, 1, "test")
shape = work.Shape(heads=4, kv_heads=2, head_dim=16, itemsize=4)
chip = chip_for((9, 0))


def check(layout):
    made.clear(); masked.clear()
    works = {"fwd": work.forward_work(layout, shape, chip), **work.backward_work(layout, shape, chip)}
    inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=16)
    leaves = list(inputs.leaves().values())
    past = {"past_key": inputs.past_key, "past_value": inputs.past_value}
    out = gist_attention(inputs.q, inputs.k, inputs.v, layout, **past, backend="triton")
    assert len(made) == 2 * works["fwd"].tiles, (len(made), works["fwd"].tiles)
    assert len(masked) == works["fwd"].masked, (len(masked), works["fwd"].masked)
    made.clear(); masked.clear()
    torch.autograd.grad(out, (inputs.q,), inputs.grad_out, retain_graph=True)
    tiles = 3 * works["dq"].tiles + 4 * (works["dkv local"].tiles + works["dkv gist"].tiles)
    assert len(made) == tiles, (len(made), tiles)
    assert len(masked) == works["dq"].masked


for name, layout in LAYOUTS.items():
    with configs.overridden(fwd=small, bwd_dq=small, bwd_dkv=small, compact=small):
        check(layout)
    print(name)
"""


@pytest.mark.slow
def test_counts_equal_the_products_that_the_kernels_make():
    done = subprocess.run(
        [sys.executable, "-c", COUNT_PRODUCTS],
        env=os.environ | {"TRITON_INTERPRET": "1", "GISTKERN_EMULATED": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["segments", "sliding", "hierarchical", "past-and-tail"], done.stderr[-2000:]


def test_pairs_are_those_of_the_dense_mask():
    layout = GistLayout.hierarchical([11] * 4, 3, 5, tail=20)
    assert work.visible_pairs(layout) == layout.dense().sum().item()


def test_full_steps_are_those_without_a_hidden_pair():
    """Row steps of dk and dv, tile by tile against the dense mask."""
    layout = GistLayout.from_segments([50, 30, 41], 20, tail=10)
    dense = layout.dense()[0].numpy()
    for gist, columns in (
        (True, dense[:, : layout.num_compact]),
        (False, dense[:, layout.num_compact :]),
    ):
        counts, full = work.column_tiles(layout, gist, 16, 4, 1)
        for tile, (count, unmasked) in enumerate(zip(counts[:, 0], full[:, 0], strict=True)):
            block = columns[:, tile * 16 : (tile + 1) * 16]
            seeing = np.flatnonzero(block.any(1))
            steps = range(seeing[0], seeing[-1] + 1, 4) if len(seeing) else range(0)
            assert count == len(steps)
            assert unmasked == sum(block[row : row + 4].all() and row + 4 <= len(block) for row in steps)


def test_one_segment_is_plain_causal_attention():
    chip = chip_for((8, 0))
    layout = GistLayout.from_segments([], 1, tail=4096, sink_tokens=0)
    done = work.forward_work(layout, work.Shape(), chip)
    ideal = 2 * 2 * work.visible_pairs(layout) * 32 * 128
    assert 1.0 < done.flops / ideal < 1.05
    # the diagonal only: 32 positions a tile, 64 columns
    assert done.masked == 4096 // 32 * 8


def test_uncompacted_tiles_are_those_of_the_token_mask():
    layout = GistLayout.from_segments([50, 30, 41], 7, tail=10)
    mask = layout.token_mask()[0].numpy()
    touched = sum(
        mask[row : row + 8, column : column + 16].any()
        for row in range(0, layout.num_rows, 8)
        for column in range(0, layout.num_rows, 16)
    )
    assert work.uncompacted_tiles(layout, 8, 16) == touched


@pytest.mark.parametrize(("costs", "slots", "expected"), [([4, 2, 2], 2, 1.0), ([1, 1, 4], 2, 0.6), ([0, 0], 2, 1.0)])
def test_balance(costs, slots, expected):
    assert work.balance(np.array(costs), slots) == pytest.approx(expected)
