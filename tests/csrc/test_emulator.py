"""The emulator does what CUDA documents; its checks find each planted mistake and leave the correct twin alone."""

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytestmark = pytest.mark.slow

WRONG = "values are wrong"
RACE = "WARNING: ThreadSanitizer: data race"

# name: {sanitizer: what it must report}
MISTAKES = {
    "missing_barrier": {"plain": WRONG, "thread": RACE},
    "missing_second_barrier": {"plain": WRONG, "thread": RACE},
    "missing_syncwarp": {"plain": WRONG, "thread": RACE},
    "block_race": {"thread": RACE},
    "arrival_no_order": {"thread": RACE},
    "arrival_no_barrier": {"thread": RACE},
    "arrival_count": {"plain": WRONG},
    "early_no_wait": {"plain": "a thread of an early launch ends without having waited"},
    "early_late_wait": {"plain": "load_128: an early launch touches memory before it has waited"},
    "global_read": {"address": "heap-buffer-overflow"},
    "global_write": {"address": "heap-buffer-overflow"},
    "shared_write": {"address": "use-after-poison"},
    "no_shared": {"address": "use-after-poison"},
    "ldmatrix_bounds": {"plain": "are outside of the block's 512 bytes of shared memory"},
    "ldmatrix_alignment": {"plain": "ldmatrix: row: address"},
    "misaligned_load": {"plain": "load_128: address"},
    "misaligned_store": {"plain": "store_128: address"},
    "misaligned_copy": {"plain": "copy_async_16: source: address"},
    "misaligned_pointer": {"address": "misaligned address"},
    "async_no_wait": {"plain": WRONG},
    "async_group_count": {"plain": WRONG},
    "async_no_commit": {"plain": WRONG},
    "async_no_barrier": {"plain": WRONG, "thread": RACE},
    "uninitialized": {"plain": WRONG},
    "divergent_barrier": {"plain": "divergent __syncthreads"},
    "shuffle_lane_missing": {"plain": "with mask 0xffffffff, threads that it names and that did not come: 31"},
    "shuffle_wrong_mask": {"plain": "__shfl_xor_sync: the mask 0x0000ffff does not name the calling lane"},
    "deadlock": {"plain": "deadlock: no thread can go on"},
}
CAUGHT = [(name, sanitizer) for name, reports in MISTAKES.items() for sanitizer in reports]


@pytest.fixture(scope="session")
def broken(emulated):
    """Run a mini-kernel of csrc/testing/broken."""

    def run(sanitizer, name, kind, seed=1):
        command = [emulated("testing/broken/main.cpp", sanitizer), name, kind]
        environment = os.environ | {"GISTKERN_EMULATOR_SEED": str(seed)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    return run


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("name", "sanitizer"), CAUGHT, ids=map("-".join, CAUGHT))
def test_mistake_is_reported(broken, name, sanitizer, seed):
    done = broken(sanitizer, name, "mistaken", seed)
    assert done.returncode != 0
    assert MISTAKES[name][sanitizer] in done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["plain", "address", "thread"])
@pytest.mark.parametrize("name", MISTAKES)
def test_correct_twin_is_clean(broken, name, sanitizer):
    done = broken(sanitizer, name, "correct")
    assert (done.returncode, done.stdout, done.stderr) == (0, "values are right\n", "")


@pytest.fixture(scope="session")
def semantics(emulated):
    """The kernels of csrc/testing/semantics.cu as a library in this process."""
    library = ctypes.CDLL(emulated("testing/semantics.cu", "plain", "-shared", "-fPIC"))

    def run(name, *arguments):
        function = getattr(library, f"run_{name}")
        function.restype = ctypes.c_char_p
        message = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))
        return None if message is None else message.decode()

    run.library = library
    library.emulator_bank_conflicts.restype = ctypes.c_int64
    return run


def fragments(matrix, shape, stride):
    """The elements ``[32, values]`` that each lane holds, by a CuTe layout ``((4, 8), shape):((thread), stride)``."""
    (slow, fast), values = stride[0], [0]
    for extent, step in zip(shape, stride[1], strict=True):
        values = [v + i * step for i in range(extent) for v in values]
    flat = matrix.T.reshape(-1)  # CuTe's layouts count down the columns
    places = [[lane % 4 * slow + lane // 4 * fast + v for v in values] for lane in range(32)]
    return torch.tensor(places), flat


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma_with_cute_layouts(semantics, dtype):
    """Fragments by the layouts of CuTe's `MMA_Traits<SM80_16x8x16_...>`, a statement independent of the emulator's."""
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    a_places, a_flat = fragments(a, (2, 2, 2), ((32, 1), (16, 8, 128)))
    b_places, b_flat = fragments(b, (2, 2), ((16, 1), (8, 64)))
    d_places, d_flat = fragments(d, (2, 2), ((32, 1), (16, 8)))
    d_lanes = d_flat[d_places].contiguous()
    is_bfloat16 = dtype == torch.bfloat16
    assert semantics("multiply_fragments", is_bfloat16, a_flat[a_places], b_flat[b_places], d_lanes) is None
    result = torch.empty(128)
    result[d_places.reshape(-1)] = d_lanes.reshape(-1)
    exact = d.double() + a.double() @ b.double().T
    torch.testing.assert_close(result.view(8, 16).T.double(), exact, rtol=0, atol=17 * 2**-24 * 30)


def test_mma_reads_every_float16(semantics):
    """Subnormals, infinities and all others, as the diagonal of a."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[~every.isnan()]
    every = torch.cat([every, every[: -len(every) % 16]]).view(-1, 16)
    picks = every[torch.randperm(len(every))[:200]]
    extremes = torch.tensor([0.0, -0.0, 2**-24, -(2**-24), 2**-14, 1023 * 2**-24, 65504, float("inf")])
    for row in [extremes.repeat(2).half(), *picks]:
        a = row[:, None].expand(16, 16).clone()  # a[i, k] = row[i]
        a[:, 1:] = 0
        b = torch.zeros(16, 8, dtype=torch.float16)
        b[0] = 1
        d = torch.empty(16, 16)
        b_wide = torch.cat([b, b], 1).contiguous()
        assert semantics("multiply_tiles", False, a, b_wide, d, False) is None
        assert torch.equal(d, row.float()[:, None].expand(16, 16))


@pytest.mark.parametrize("transposed", [False, True], ids=["values", "keys"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_async_copy_ldmatrix_and_mma(semantics, dtype, transposed):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    assert semantics("multiply_tiles", dtype == torch.bfloat16, a, b, d, transposed) is None
    exact = a.double() @ (b.T if transposed else b).double()
    torch.testing.assert_close(d.double(), exact, rtol=0, atol=17 * 2**-24 * 30)


@pytest.mark.parametrize(
    ("row_bytes", "swizzled", "conflicts"),
    [(16, False, 0), (32, False, 4 * 1), (64, False, 4 * 3), (128, False, 4 * 7), (128, True, 0), (144, False, 0)],
)
def test_bank_conflicts(semantics, row_bytes, swizzled, conflicts):
    before = semantics.library.emulator_bank_conflicts()
    out = torch.empty(128, dtype=torch.int32)
    assert semantics("load_tile", out, row_bytes, swizzled) is None
    assert semantics.library.emulator_bank_conflicts() - before == conflicts
    assert (out == -1).all()  # shared memory starts as NaN


def test_lanes_exchange(semantics):
    values = torch.randint(1000, (5, 32), dtype=torch.int32)
    mine, lanes = values[0].clone(), torch.arange(32)
    assert semantics("exchange_lanes", values) is None
    assert torch.equal(values[1], mine[lanes ^ 5])
    assert torch.equal(values[2], mine[3].expand(32))
    assert torch.equal(values[3], mine[torch.where(lanes + 4 < 32, lanes + 4, lanes)])
    votes = int((mine % 2).long() @ (1 << lanes))
    assert ((values[4].long() & 0xFFFFFFFF) == votes).all()


def test_indices(semantics):
    """Launched by several threads of this process at once, as a library is."""
    outs = [torch.empty(12, 24, 6, dtype=torch.int32) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda out: semantics("write_indices", out), outs)) == [None] * 8
    expected = [
        [[bx, by, bz, x, y, z] for z in range(2) for y in range(3) for x in range(4)]
        for bz in range(2)
        for by in range(2)
        for bx in range(3)
    ]
    assert all(out.tolist() == expected for out in outs)


def test_order_of_blocks(semantics, monkeypatch):
    """Every block once, in an order that is shuffled, repeatable, and the seed's."""

    def order(seed):
        monkeypatch.setenv("GISTKERN_EMULATOR_SEED", str(seed))
        blocks, count = torch.full((50,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        assert semantics("write_order", blocks, count, 50) is None
        return blocks.tolist()

    assert sorted(order(1)) == list(range(50)) != order(1)
    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize("valid", [0, 6, 16])
def test_async_copy_fills_with_zeros(semantics, valid):
    data = torch.arange(1, 17, dtype=torch.uint8)
    out = torch.zeros(2, 16, dtype=torch.uint8)
    assert semantics("copy_some", data, out, valid) is None
    assert (out[0] == 0xFF).all()  # in flight
    assert out[1].tolist() == [*range(1, valid + 1), *[0] * (16 - valid)]


def test_errors_returned(semantics):
    """An error ends its launch only; a configuration that CUDA refuses is refused without running."""
    semantics.library.emulator_return_errors(True)
    try:
        assert "divergent __syncthreads\n  threads 1-3 wait" in semantics("skip_barrier", 1, 4, 0)
        assert semantics("skip_barrier", 5, 1, 0) is None
    finally:
        semantics.library.emulator_return_errors(False)
    assert "empty grid" in semantics("skip_barrier", 0, 1, 0)
    assert "block" in semantics("skip_barrier", 1, 1025, 0)
    assert "shared memory" in semantics("skip_barrier", 1, 1, 228 * 1024)
