"""Hopper's backward compiles for sm_90 as its page says, and the gate fails where it should."""

from copy import deepcopy

import pytest
import torch

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
    row = rows[0]
    for wrong, change in {
        "no products": {"inner_loop": None},
        "bytes of shared memory": {"shared_bytes": 300_000},
        "bytes of stack": {"stack_bytes": 96},
        "no copies by TMA": {"tma": 0},
        "serialized": {"ptxas_warnings": ["wgmma.mma_async instructions are serialized"]},
    }.items():
        (problem,) = hopper_backward.problems(row | change)
        assert wrong in problem
    loop = deepcopy(row["inner_loop"])
    loop["issue_per_tensor_cycle"], loop["full_tile"]["local memory (spills)"] = 0.7, 3
    assert len(hopper_backward.problems(row | {"inner_loop": loop})) == 2
