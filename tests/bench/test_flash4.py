"""What FlashAttention-4 is given as a rival: lists of blocks that hold every pair that is seen, and no other."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import documents

from bench.compiled.machine_code import issue_per_tensor_cycle
from bench.measured import flash4
from gistkern import GistLayout

ROOT = Path(__file__).parents[2]
RAGGED = GistLayout.from_segments([37, 50, 9], 20, tail=20)


def dense_blocks(layout, block):
    """Pairs seen in each block, counted in the dense matrix."""
    (high, wide), seen = block, layout.dense()[0].int()
    seen = F.pad(seen, (0, -seen.shape[1] % wide, 0, -seen.shape[0] % high))
    return seen.view(seen.shape[0] // high, high, seen.shape[1] // wide, wide).sum((1, 3))


@given(
    documents().filter(lambda one: not one.past and not one.tail),
    st.sampled_from([None, 1, 7, 30]),
    st.sampled_from([(16, 16), (8, 32), (128, 128)]),
)
@settings(max_examples=60)
def test_blocks_are_those_of_the_dense_matrix(layout, window, block):
    layout = layout if window is None else layout.windowed(window)
    counted = dense_blocks(layout, block)
    masked, full = flash4.touched(layout, block)
    assert torch.equal(full, counted == block[0] * block[1])
    assert torch.equal(masked, (counted > 0) & ~full)


@pytest.mark.parametrize("transposed", [False, True], ids=["by-rows", "by-keys"])
def test_lists_name_each_block_once_and_in_order(transposed):
    masked, full = flash4.touched(RAGGED, (16, 16))
    if transposed:
        masked, full = masked.T, full.T
    lists = flash4.Blocks.of(masked, full)
    for wanted, count, places in ((masked, *lists[:2]), (full, *lists[2:])):
        assert wanted.any()
        for line, number, found in zip(wanted, count[0, 0].tolist(), places[0, 0].tolist(), strict=True):
            assert found[:number] == line.nonzero().flatten().tolist()
            assert sorted(found) == list(range(len(line)))


def test_issue_is_counted_from_what_the_products_multiply():
    turn = ["HGMMA.64x128x16.F32.BF16"] * 8 + ["FFMA"] * 248
    # 8 products of 64 x 128 x 16 take 512 cycles at 2,048 multiplications a cycle
    assert issue_per_tensor_cycle(turn) == 0.5
    assert issue_per_tensor_cycle(["FFMA", "HMMA.16816.F32"]) is None


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn-4 is not installed")
def test_its_kernels_compile_under_our_rule():
    done = subprocess.run(
        [sys.executable, "-m", "bench.compiled.flash4"], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"forward", "backward"} <= set(done.stdout.replace("|", " ").split())
