"""Hopper's backward compiles for sm_90 as its page says, and the gate fails where it should."""

import pytest
import torch
from hopper_gate import check_gate

pytest.importorskip("triton")
pytest.importorskip("cuxray")

from bench.compiled import hopper_backward


@pytest.fixture(scope="module")
def rows():
    return [hopper_backward.row_of(kernel, 128) for kernel in ("bwd_dq", "bwd_dkv_local")]


def test_what_ships(rows):
    for row in rows:
        assert hopper_backward.problems(row) == []
        assert row["warps_per_multiprocessor"] == 12, "two warpgroups, and one for the warp that copies"


@pytest.mark.slow
def test_what_ships_in_fp16_at_64():
    for kernel in hopper_backward.KERNELS:
        assert hopper_backward.problems(hopper_backward.row_of(kernel, 64, torch.float16)) == []


def test_the_gate(rows):
    check_gate(hopper_backward.problems, rows[0])
