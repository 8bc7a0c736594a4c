"""Which lane holds what around mma and ldmatrix: the emulator and the kernels agree with CuTe's layouts (CUTLASS).

CuTe gives every operand as a map (lane, value) -> element; of ldmatrix, (lane, bit) -> bit. Here each comparison is a
function of these maps that says whether the emulator agrees, so that wrong maps can be tried on it too.
"""

import ctypes
import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch
from build_tools import CSRC, load_build

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fragments")]  # they share two builds

REQUIREMENT = "nvidia-cutlass==4.2.0.0"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = {64: 32, 128: 16}  # of a tile of keys or values, by its width
# what the decode kernel's masks and statistics take for the row and column of value 2 half + i: lane / 4 + 8 half and
# 2 (lane % 4) + i, counted as CuTe does
LANE, VALUE = torch.arange(32)[:, None], torch.arange(4)
KERNEL_MAPS = {"c": LANE // 4 + VALUE // 2 * 8 + 16 * (2 * (LANE % 4) + VALUE % 2)}


def cutlass_include() -> Path | None:
    """CUTLASS's headers in the PyPI package, which need not be importable."""
    spec = importlib.util.find_spec("cutlass_library")
    folders = [Path(folder) / "source" / "include" for folder in spec.submodule_search_locations or ()] if spec else []
    return next((folder for folder in folders if (folder / "cute" / "layout.hpp").is_file()), None)


@pytest.fixture(scope="session")
def cute(tmp_path_factory):
    """CuTe's maps: operation -> operand -> tensor [32 lanes, values]."""
    tools, include = load_build(), cutlass_include()
    if include is None:
        pytest.skip(f"needs CuTe's headers: pip install --no-deps {REQUIREMENT}")
    if tools.cxx() is None or tools.cuda_include() is None:
        pytest.skip("needs a C++ compiler and NVIDIA's headers (CUDA_HOME, nvcc on the path, or PyPI)")
    cuda = tools.cuda_include()
    if not any((folder / "cuda" / "std" / "utility").is_file() for folder in (cuda, cuda / "cccl")):
        pytest.skip("needs NVIDIA's C++ library headers (CUDA, or PyPI's nvidia-cuda-cccl)")
    program = tmp_path_factory.mktemp("cute") / "cute_layouts"
    folders = [word for folder in (include, cuda, cuda / "cccl") for word in ("-isystem", folder)]
    command = [tools.cxx(), "-std=c++17", "-O0", *folders, CSRC / "testing" / "cute_layouts.cpp", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    return {name: {part: torch.tensor(rows) for part, rows in parts.items()} for name, parts in said.items()}


@pytest.fixture(scope="session")
def run(emulated):
    """Call run_NAME of csrc/testing/fragments.cu or semantics.cu."""
    options = ("-shared", "-fPIC", "-Wno-unknown-pragmas", "-Wno-unused-parameter")
    libraries = [
        ctypes.CDLL(emulated("testing/fragments.cu", "plain", *options)),
        ctypes.CDLL(emulated("testing/semantics.cu", "plain", "-shared", "-fPIC")),
    ]

    def call(name, *arguments):
        function = next(getattr(library, f"run_{name}") for library in libraries if hasattr(library, f"run_{name}"))
        function.restype = ctypes.c_char_p
        message = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments))
        assert message is None, message.decode()

    return call


def ldmatrix_agrees(run, maps, transposed):
    memory, found = torch.arange(256, dtype=torch.int16), torch.zeros(32, 8, dtype=torch.int16)
    run("load_matrices", memory, found, transposed)
    # where each bit of the source stands in memory: lane l points to the 128 bits from 128 l on
    bits = torch.empty(32 * 128, dtype=torch.long)
    bits[maps["source"]] = torch.arange(32 * 128).view(32, 128)
    expected = bits[maps["destination"]].view(32, 8, 16)
    whole = torch.equal(expected, expected[:, :, :1] + torch.arange(16))
    return whole and torch.equal(found.long(), expected[:, :, 0] // 16)


def mma_agrees(run, maps, dtype):
    """Which b value times one a value goes to which d value, for all of them."""
    numbers = torch.arange(1, 129)
    b = numbers.view(32, 4).to(DTYPES[dtype])  # these are exact in bfloat16 too
    found = torch.zeros(256, 32, 4)
    for place, products in enumerate(found):
        a = torch.zeros(256, dtype=DTYPES[dtype])
        a[place] = 1
        run("multiply_fragments", dtype == "bfloat16", a, b, products)
    # CuTe's indices count down the columns of a [16, 16 k], b [8, 16 k] and d [16, 8]
    a_map, b_map, d_map = (maps[name].reshape(-1) for name in "abc")
    b_at = torch.zeros(8, 16, dtype=torch.long)
    b_at[b_map % 8, b_map // 8] = numbers
    same_row = a_map[:, None] % 16 == d_map % 16
    expected = b_at[d_map // 16, a_map[:, None] // 16] * same_row
    return torch.equal(found.view(256, 128).long(), expected)


def queries_agree(run, maps, width):
    query = torch.arange(16 * width, dtype=torch.int16).view(16, width)
    found = torch.zeros(32, width // 16, 8, dtype=torch.int16)
    run("load_queries", width, query, found)
    rows, k = maps["a"] % 16, maps["a"] // 16
    expected = torch.stack([query[rows, 16 * step + k] for step in range(width // 16)], 1)
    return torch.equal(found, expected)


def in_lanes(matrix, maps):
    """[16, 8 n] as the lanes hold it after mma: [32, n, 4]."""
    rows, columns = maps["c"] % 16, maps["c"] // 16
    return torch.stack([matrix[rows, 8 * n + columns] for n in range(matrix.shape[1] // 8)], 1)


def integers(*shape):
    """Small enough that sums of products are exact."""
    return torch.randint(-8, 9, shape).float()


def keys_agree(run, maps, dtype, width):
    query, keys = integers(16, width), integers(COLUMNS[width], width)
    rows, k = maps["a"] % 16, maps["a"] // 16
    fragments = torch.stack([query[rows, 16 * step + k] for step in range(width // 16)], 1).to(DTYPES[dtype])
    found = torch.zeros(32, 2, COLUMNS[width] // 8, 2)
    run("multiply_keys", width, dtype == "bfloat16", fragments, keys.to(DTYPES[dtype]), found)
    # scores[half][2 n + i] is d value 2 half + i of the n-th eight columns
    return torch.equal(found.transpose(1, 2).reshape(32, -1, 4), in_lanes(query @ keys.T, maps))


def values_agree(run, maps, dtype, width):
    probabilities, values = integers(16, COLUMNS[width]), integers(COLUMNS[width], width)
    given = in_lanes(probabilities, KERNEL_MAPS).view(32, -1, 2, 2).transpose(1, 2).contiguous()
    found = torch.zeros(32, width // 8, 4)
    run("multiply_values", width, dtype == "bfloat16", given, values.to(DTYPES[dtype]), found)
    return torch.equal(found, in_lanes(probabilities @ values, maps))


@pytest.mark.parametrize("operation", ["ldmatrix", "ldmatrix_trans"])
def test_ldmatrix(run, cute, operation):
    assert ldmatrix_agrees(run, cute[operation], operation == "ldmatrix_trans")


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma(run, cute, dtype):
    assert mma_agrees(run, cute[dtype], dtype)


@pytest.mark.parametrize("width", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decode_kernel(run, cute, dtype, width):
    assert queries_agree(run, cute[dtype], width)
    assert keys_agree(run, cute[dtype], dtype, width)
    assert values_agree(run, cute[dtype], dtype, width)


def test_rows_and_columns_of_the_kernels_masks(cute):
    assert all(torch.equal(cute[dtype]["c"], KERNEL_MAPS["c"]) for dtype in DTYPES)


def exchanged(maps, part, what):
    """The same maps with two lanes, two registers or the halves of a register of one operand exchanged."""
    given = maps[part]
    wrong = given.clone()
    size = given.shape[1] // (4 if part in ("source", "destination") else 2)  # of a register
    if what == "lanes":
        wrong[[1, 2]] = given[[2, 1]]
    elif what == "registers":
        wrong[:, :size], wrong[:, size : 2 * size] = given[:, size : 2 * size], given[:, :size]
    else:
        wrong[:, : size // 2], wrong[:, size // 2 : size] = given[:, size // 2 : size], given[:, : size // 2]
    return maps | {part: wrong}


EXCHANGES = ["lanes", "registers", "halves"]


@pytest.mark.parametrize("what", EXCHANGES)
@pytest.mark.parametrize("operation", ["ldmatrix", "ldmatrix_trans"])
def test_a_wrong_map_of_ldmatrix_is_found(run, cute, operation, what):
    assert not ldmatrix_agrees(run, exchanged(cute[operation], "destination", what), operation == "ldmatrix_trans")


@pytest.mark.parametrize("what", EXCHANGES)
@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_a_wrong_map_of_mma_is_found(run, cute, part, what):
    maps = exchanged(cute["float16"], part, what)
    assert not mma_agrees(run, maps, "float16")
    if part == "a":
        assert not queries_agree(run, maps, 64)
    if part != "b":
        assert not keys_agree(run, maps, "float16", 64)
    if part == "c":
        assert not values_agree(run, maps, "float16", 64)


def test_transposing_is_not_taken_for_loading(run, cute):
    assert not ldmatrix_agrees(run, cute["ldmatrix"], True)
    assert not ldmatrix_agrees(run, cute["ldmatrix_trans"], False)
