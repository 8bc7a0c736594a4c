"""Hopper's own kernels compile for sm_90 as their page says, and the gate fails where it should."""

import pytest
import torch
from hopper_gate import check_gate

pytest.importorskip("triton")
pytest.importorskip("cuxray")

from bench.compiled import hopper
from bench.compiled.machine_code import CLASSES
from bench.counted.hopper import efficiency
from bench.counted.work import Shape
from bench.shapes import layout_of
from bench.variants import VARIANTS


@pytest.fixture(scope="module")
def shipped():
    return hopper.row_of(next(variant for variant in VARIANTS if variant.ships and variant.head_dim == 128))


def test_the_forward_that_ships(shipped):
    assert hopper.problems(shipped) == []
    assert shipped["inner_loop"]["issue_per_tensor_cycle"] <= hopper.MOST_ISSUE
    assert shipped["warps_per_multiprocessor"] == 12, "two warpgroups, and one for the warp that copies"
    assert set(shipped["inner_loop"]["full_tile"]) <= set(CLASSES)


@pytest.mark.slow
def test_the_forward_that_ships_in_fp16_at_64():
    (variant,) = [variant for variant in VARIANTS if variant.ships and variant.head_dim == 64]
    assert hopper.problems(hopper.row_of(variant, torch.float16)) == []


def test_the_gate(shipped):
    check_gate(hopper.problems, shipped)


def test_one_tile_of_each_head_dimension_ships():
    assert [variant.head_dim for variant in VARIANTS if variant.ships] == [64, 128]


def test_little_is_visited_in_vain():
    layout = layout_of("512/8", 16384)
    assert efficiency(layout, Shape(), 128) > 0.915
    assert efficiency(layout, Shape(), 64) > 0.915
