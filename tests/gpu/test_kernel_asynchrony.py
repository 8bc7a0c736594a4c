"""What tests/gpu/asynchrony.py adds to ttsem: a small pipeline is right, and wrong in every way that it can be."""

import pytest
import torch
from emulation import INTERPRETED, SANITIZED

if INTERPRETED:
    pytest.skip("the interpreter runs no Gluon", allow_module_level=True)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gistkern.kernels.hopper.ring import barriers, following

SIDE, TILES = 64, 5
BYTES = gl.constexpr(2 * SIDE * SIDE)
TILE = gl.NVMMASharedLayout.get_default_for([SIDE, SIDE], gl.float16)


@gluon.jit
def multiply(c_map, c_smem, rings, full, empty, n: gl.constexpr, stages: gl.constexpr):
    a_ring, b_ring = rings
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_c = gl.zeros([64, 64], gl.float32, layout)
    i_stage = 0
    i_phase = 0
    for _ in range(n):
        mbarrier.wait(full.index(i_stage), i_phase)
        token = warpgroup_mma(a_ring.index(i_stage), b_ring.index(i_stage), b_c, is_async=True)
        b_c = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(empty.index(i_stage), count=1)
        i_stage, i_phase = following(i_stage, i_phase, stages)
    c_smem.store(b_c.to(gl.float16))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_map, [0, 0], c_smem)
    tma.store_wait(0)


@gluon.jit
def copy(a_map, b_map, rings, full, empty, n: gl.constexpr, stages: gl.constexpr):
    a_ring, b_ring = rings
    i_stage = 0
    i_phase = 0
    for i in range(n):
        mbarrier.wait(empty.index(i_stage), i_phase ^ 1)
        mbarrier.expect(full.index(i_stage), 2 * BYTES)
        tma.async_copy_global_to_shared(a_map, [0, i * 64], full.index(i_stage), a_ring.index(i_stage))
        tma.async_copy_global_to_shared(b_map, [i * 64, 0], full.index(i_stage), b_ring.index(i_stage))
        i_stage, i_phase = following(i_stage, i_phase, stages)


@gluon.jit
def product_kernel(a_map, b_map, c_map, n: gl.constexpr, stages: gl.constexpr):
    layout: gl.constexpr = a_map.layout
    a_ring = gl.allocate_shared_memory(gl.float16, [stages, 64, 64], layout)
    b_ring = gl.allocate_shared_memory(gl.float16, [stages, 64, 64], layout)
    c_smem = gl.allocate_shared_memory(gl.float16, [64, 64], layout)
    full = barriers(stages, 1)
    empty = barriers(stages, 1)
    fence_async_shared()
    rings = a_ring, b_ring
    gl.warp_specialize(
        [
            (multiply, (c_map, c_smem, rings, full, empty, n, stages)),
            (copy, (a_map, b_map, rings, full, empty, n, stages)),
        ],
        [1],
        [24],
    )


def product(device):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(SIDE, TILES * SIDE, generator=generator).half()
    b = torch.randn(TILES * SIDE, SIDE, generator=generator).half()
    c = torch.full((SIDE, SIDE), torch.nan, dtype=torch.float16, device=device)
    maps = [TensorDescriptor.from_tensor(t, [SIDE, SIDE], TILE) for t in (a.to(device), b.to(device), c)]
    product_kernel[(1,)](*maps, TILES, 2, num_warps=4)
    torch.testing.assert_close(c.cpu().double(), a.double() @ b.double(), rtol=2e-3, atol=2e-3)


WRONG = {
    "ttng.wait_barrier": ("has not waited for what it reads", "has not waited for the phase before"),
    "ttng.arrive_barrier": ("deadlock",),
    "ttng.barrier_expect": ("deadlock",),
    "ttng.fence_async_shared": ("without a fence",) * 2,
    "ttng.warp_group_dot_wait": ("overwrites what product 0 of partition 0 may still read",),
    "ttng.async_tma_store_wait": ("ends before",),
}


@pytest.mark.skipif(not SANITIZED, reason="on a GPU most of these go well most of the time")
def test_every_mistake_shows(device):
    from asynchrony import dropped, plants

    product(device)
    assert plants() == [(kind, number) for kind, reasons in WRONG.items() for number in range(len(reasons))]
    for kind, reasons in WRONG.items():
        for number, reason in enumerate(reasons):
            with dropped(kind, number), pytest.raises(Exception, match=reason):
                product(device)


@pytest.mark.skipif(SANITIZED, reason="the other test's part")
def test_the_pipeline(device):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    product(device)
