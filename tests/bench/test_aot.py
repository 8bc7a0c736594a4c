"""`make aot`: it compiles what a user's call compiles, its gates hold on a subset, and they fail when they should."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("triton")
pytest.importorskip("cuxray")

import triton
from triton.runtime.driver import driver

from bench.compiled import aot
from bench.compiled import cuda as aot_cuda
from bench.compiled.control_flow import Instruction, working_loop
from bench.compiled.kernels import ARCHS, HEAD_DIMS, KERNELS, Build, compiler_input, launch_of, target_of
from bench.compiled.machine_code import CLASSES, FORMS, Cubin, describe_cubin
from bench.fill import filled
from gistkern.kernels import configs
from gistkern.kernels.chips import chip_named

ROOT = Path(__file__).parents[2]

SUBSET = [(kernel, arch) for kernel in ("fwd", "bwd_dkv_gist", "decode") for arch in ("sm_80", "sm_90")]
OURS = [kernel for kernel in KERNELS if not kernel.startswith("plain_")]


@pytest.mark.parametrize(("kernel", "arch"), SUBSET, ids=[f"{kernel}-{arch}" for kernel, arch in SUBSET])
def test_no_spills_tensor_cores_in_the_loop_and_shared_memory_within_limits(kernel, arch):
    row = aot.row_of(kernel, arch, 128)
    assert aot.problems(row) == []
    assert row["inner_loop"]["tensor_core_instructions"] > 0
    assert row["inner_loop"]["async_copies"] > 0, "keys and values come by cp.async while the tile before is used"
    assert row["blocks_per_multiprocessor"] >= 1
    # unclassified opcodes would appear in the mix under their own names
    assert set(row["inner_loop"]["full_tile"]) <= set(CLASSES)


def test_the_gate_fails_on_a_tile_that_spills():
    with configs.overridden(fwd=configs.Config(128, 128, 4, 2, "too large")):
        row = aot.row_of("fwd", "sm_80", 128)
    assert row["spill_bytes"] > 0
    assert row["stack_bytes"] > 0
    assert row["spill_instructions"] > 0
    failures = aot.check([row])
    assert len(failures) == 1
    assert "spills" in failures[0]


def test_the_gate_fails_on_more_shared_memory_than_the_chip_has():
    with configs.overridden(fwd=configs.Config(128, 64, 8, 5, "too deep")):
        failures = aot.check([aot.row_of("fwd", "sm_86", 128)])
    assert len(failures) == 1
    assert "bytes of shared memory" in failures[0]


def test_the_gate_fails_without_tensor_cores_in_the_loop():
    row = aot.row_of("sum_chunks", "sm_80", 64)
    assert aot.problems(row) == []
    assert aot.problems(row | {"kernel": "fwd"}) == ["no tensor-core instruction in a loop"]


def test_the_gate_fails_on_a_warning_of_ptxas_and_on_a_kernel_that_does_not_compile():
    row = aot.row_of("sum_chunks", "sm_80", 64)
    assert "serialized" in aot.problems(row | {"ptxas_warnings": ["wgmma instructions are serialized"]})[0]
    with mock.patch.object(aot, "build", side_effect=RuntimeError("PassManager::run failed")):
        row = aot.row_of("sum_chunks", "sm_80", 64)
    assert aot.problems(row) == ["does not compile: RuntimeError PassManager::run failed"]


def test_a_plain_kernel_may_spill_in_our_tiles_but_must_compile():
    row = {"kernel": "plain_fwd", "arch": "sm_80", "head_dim": 64, "plain": True}
    spilling = row | {"spill_bytes": 8, "spill_instructions": 2, "shared_bytes": 0, "shared_limit": 1}
    assert aot.check([spilling | {"inner_loop": {"tensor_core_instructions": 4}}]) == []
    assert aot.check([row | {"error": "no"}]) == ["plain_fwd on sm_80, D=64: does not compile: no"]


def leaves(arguments, path=()):
    """(path, type) of everything in nested tuples, as the compiler numbers it."""
    for i, argument in enumerate(arguments):
        yield from leaves(argument, (*path, i)) if isinstance(argument, tuple) else [((*path, i), argument)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_arguments_are_specialized_as_declared(kernel):
    source = compiler_input(launch_of(kernel, "sm_90", 128), "sm_90")
    fn, names = source.fn, source.fn.arg_names
    assert list(source.signature) == names
    kinds = dict(leaves(source.signature.values()))
    declared = {(param.num,) for param in fn.params if param.is_constexpr}
    # no integer that happened to be 1 became a constant
    assert {path for path, kind in kinds.items() if kind == "constexpr"} == declared == set(source.constexprs)
    divisible = {path for path, found in source.attrs.items() if ["tt.divisibility", 16] in found}
    pointers = {path for path, kind in kinds.items() if kind.startswith("*")}
    counts = {(names.index(name),) for name in fn.do_not_specialize}
    # what stands in a tuple is specialized whatever the kernel declares: strides may, counts must not
    strides = {path for path in kinds if len(path) > 1 or names[path[0]].startswith("stride_")} - pointers
    assert divisible == pointers | strides
    assert divisible.isdisjoint(counts)
    assert {path for path, name in enumerate(names) if name.endswith("_ptr")} <= {path[0] for path in pointers}
    assert {path for path, kind in kinds.items() if kind == "i32"} == counts | strides
    scale = {(names.index("scale"),)} if "scale" in names else set()
    assert set(kinds) == declared | divisible | counts | scale
    assert all(kinds[path] == "fp32" for path in scale)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", OURS)
def test_the_compiler_gets_what_tritons_runtime_would_give_it(kernel, arch):
    launch = launch_of(kernel, arch, 128)
    source = compiler_input(launch, arch)
    device = SimpleNamespace(
        get_current_device=lambda: f"aot-{arch}",
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target_of(arch),
    )
    given = []

    def instead_of_compiling(*, compile, **rest):
        given.append(compile)
        return True

    with (
        mock.patch.object(driver, "_active", device),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", instead_of_compiling),
    ):
        launch.fn[(1,)](*launch.args, **launch.kwargs)
    (compiled,) = given
    assert compiled["signature"] == source.signature
    assert compiled["constants"] == source.constexprs
    assert compiled["configs"] == [source.attrs]
    options = json.loads(compiled["specialization_data"])["options"]
    assert options == json.loads(json.dumps(source.options))


def test_the_working_loop_is_found_and_its_mask_arm_is_not_counted():
    code = [
        Instruction("S2R"),
        Instruction("LDG", labels=("spin",)),
        Instruction("BRA", target="spin"),  # an inner loop without tensor cores
        Instruction("HMMA", labels=("loop",)),
        Instruction("BRA", target="full"),
        Instruction("FSEL"),
        Instruction("FSEL"),
        Instruction("HMMA", labels=("full",)),
        Instruction("BRA", target="loop"),
        Instruction("EXIT", falls_through=False),
    ]
    loop = working_loop(code, lambda opcode: opcode == "HMMA")
    assert loop.body == ("HMMA", "BRA", "FSEL", "FSEL", "HMMA", "BRA")
    assert loop.shortest_turn == ("HMMA", "BRA", "HMMA", "BRA")
    assert working_loop(code, lambda opcode: opcode == "HGMMA") is None


def test_tensor_cores_that_one_elected_warp_drives_are_on_the_shortest_turn():
    code = [
        Instruction("ISETP", labels=("loop",)),
        Instruction("BRA", target="others"),
        Instruction("UTCHMMA"),
        Instruction("MUFU", labels=("others",)),
        Instruction("BRA", target="loop"),
        Instruction("EXIT", falls_through=False),
    ]
    assert "UTCHMMA" in working_loop(code, lambda opcode: opcode == "UTCHMMA").shortest_turn


# run in a process of its own: kernels are interpreted there
CHECK_PLAIN_FLASH = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from gistkern.kernels import configs
from bench.compiled.plain_flash import launch_plain

config = configs.Config(BM, BN, 4, 1, "test")
q, grad_out = torch.randn(2, 4, 45, 16, requires_grad=True), torch.randn(2, 4, 45, 16)
k, v = (torch.randn(2, 2, 45, 16, requires_grad=True) for _ in range(2))
expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
gradients = torch.autograd.grad(expected, (q, k, v), grad_out)
lse = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~torch.ones(45, 45).tril().bool(), -torch.inf).logsumexp(-1)
with torch.no_grad(), configs.overridden(fwd=config, bwd_dq=config, bwd_dkv=config):
    (out, dq), (dk, dv) = ([torch.full_like(one, torch.nan) for _ in range(2)] for one in (q, k))
    found_lse, delta = (torch.full_like(lse, torch.nan) for _ in range(2))
    launch_plain("fwd", (q, k, v), (out, found_lse), 0.25, "ieee")
    launch_plain("bwd_dq", (q, k, v, grad_out), (out, found_lse, delta, dq), 0.25, "ieee")
    launch_plain("bwd_dkv", (q, k, v, grad_out), (found_lse, delta, dk, dv), 0.25, "ieee")
for found, wanted in zip((out, found_lse, dq, dk, dv), (expected, lse, *gradients), strict=True):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (32, 16)], ids=["tiles=16x32", "tiles=32x16"])
@pytest.mark.slow
def test_the_plain_flash_kernel_is_right(rows, columns):
    """What is compared with must do the work: forward, LSE and gradients against SDPA, N=45, grouped heads."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK_PLAIN_FLASH.replace("BM", str(rows)).replace("BN", str(columns))],
        env=os.environ | {"TRITON_INTERPRET": "1", "GISTKERN_EMULATED": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def committed():
    return json.loads((ROOT / "docs" / "internals" / "compiled.json").read_text())


def test_the_committed_evidence_is_complete_and_its_page_belongs_to_it(committed):
    rows = {(row["kernel"], row["arch"], row["head_dim"]): row for row in committed["rows"]}
    assert set(rows) == set(aot.every_row())
    nvidia = [arch for arch in ARCHS if arch.startswith("sm_")]
    assert set(rows) == {(kernel, arch, dim) for kernel in KERNELS for arch in ARCHS for dim in HEAD_DIMS} | {
        (kernel, arch, dim) for kernel in aot_cuda.CUDA_KERNELS for arch in nvidia for dim in HEAD_DIMS
    }
    assert len(rows) == len(committed["rows"])
    assert committed["grade"] == "compiled"
    for key, row in rows.items():
        assert row["problems"] == aot.problems(row), key
        assert not row["problems"] or row["plain"], key
    page = (ROOT / "docs" / "internals" / "compiled.md").read_text()
    assert filled(page, aot.tables(committed)) == page, "run python -m bench.pages"
    assert str(ROOT) not in json.dumps(committed)


@pytest.fixture(scope="module")
def cuda_launch_of():
    if reason := aot_cuda.missing():
        pytest.skip(reason)
    with aot_cuda.planner() as launch_of_cuda:
        yield launch_of_cuda


def test_the_committed_evidence_is_about_the_cuda_launches_of_today(committed, cuda_launch_of):
    for row in committed["rows"]:
        if row["kernel"] in aot_cuda.CUDA_KERNELS:
            launch = cuda_launch_of(row["kernel"], row["arch"], row["head_dim"])
            found = row["function"], row["config"], row["shared_bytes"]
            assert found == (launch.function, launch.config, launch.shared_bytes), "run `make aot`"
            assert row["forms"].keys() == FORMS.keys()
            assert set(row["inner_loop"]["full_tile"]) <= set(CLASSES)
            assert row["functions_beside"] > 20 or row["kernel"] == "cuda_compact"


def test_cuda_launches_are_those_of_the_host_code(cuda_launch_of):
    mma = cuda_launch_of("cuda_decode_mma", "sm_90", 128)
    assert mma.function == "gist_decode_mma_kernel<__nv_bfloat16, 128, false>"
    # four warps, each with two stages of a key and a value tile of 16 rows of 128 two-byte elements
    assert (mma.threads, mma.shared_bytes) == (128, 4 * 2 * 2 * 16 * 128 * 2)
    assert mma.config == {"PACK": 4, "BM": 16, "BN": 16, "num_warps": 4, "num_stages": 2}
    functions = {name: cuda_launch_of(name, "sm_80", 64).function for name in aot_cuda.CUDA_KERNELS}
    assert functions == {
        "cuda_decode_mma": "gist_decode_mma_kernel<__nv_bfloat16, 64, false>",
        "cuda_decode_mma_quantized": "gist_decode_mma_kernel<__nv_bfloat16, 64, true>",
        "cuda_decode_simt": "gist_decode_simt_kernel<__nv_bfloat16, 1, false>",
        "cuda_decode_simt_rows": "gist_decode_simt_kernel<__nv_bfloat16, 4, false>",
        "cuda_decode_simt_quantized": "gist_decode_simt_kernel<__nv_bfloat16, 1, true>",
        "cuda_decode_simt_rows_quantized": "gist_decode_simt_kernel<__nv_bfloat16, 4, true>",
        "cuda_compact": "gist_compact_kernel",
    }


@pytest.fixture(scope="module")
def compact_row(cuda_launch_of):
    launch = cuda_launch_of("cuda_compact", "sm_80", 128)
    return aot_cuda.rows_of("compact", "sm_80", {("cuda_compact", 128): launch})["cuda_compact", "sm_80", 128]


def test_a_cuda_kernel_is_compiled_and_passes_the_gates(compact_row):
    assert aot.problems(compact_row) == []
    assert compact_row["function"] == "gist_compact_kernel"
    assert compact_row["registers"] > 0
    assert compact_row["blocks_per_multiprocessor"] >= 1
    assert compact_row["forms"]["LDG 128"] > 0
    assert compact_row["inner_loop"]["full_tile"]["global memory"] > 0
    assert set(compact_row["inner_loop"]["full_tile"]) <= set(CLASSES)


def test_the_gates_fail_on_a_cuda_kernel_without_its_instructions(compact_row):
    assert aot.problems(compact_row | {"forms": dict.fromkeys(FORMS, 0)}) == ["no LDG 128 instruction"]
    # a copy taken for decoding on tensor cores
    assert aot.problems(compact_row | {"kernel": "cuda_decode_mma"}) == [
        "no tensor-core instruction in a loop",
        *[f"no {form} instruction" for form in ("HMMA", "LDGSTS 128", "LDSM", "LDSM transposed")],
        "no asynchronous copy in the inner loop",
    ]
    (beside,) = aot.problems(compact_row | {"spilling_beside": ["another_kernel"]})
    assert beside == "another_kernel of the same file spills"
    failures = aot.check([compact_row | {"shared_bytes": 200 * 1024}])
    assert "bytes of shared memory" in failures[0]


SPILLS = """
__global__ void clean(float* a) { a[threadIdx.x] += 1; }
__global__ void __launch_bounds__(1024, 2) crowded(float* a) {
  __shared__ float last[50];
  float x[64];
  for (int i = 0; i < 64; ++i) x[i] = a[i * threadIdx.x];
  for (int j = 0; j < 64; ++j) {
    for (int i = 0; i < 64; ++i) x[i] = x[i] * x[(i + 7) % 64] + x[(i * 3 + 1) % 64];
  }
  for (int i = 0; i < 64; ++i) a[i * threadIdx.x] = x[i];
  last[threadIdx.x % 50] = x[0];
  __syncthreads();
  a[threadIdx.x] = last[threadIdx.x / 32];
}
"""


def test_spills_and_static_shared_memory_of_nvccs_code_are_seen(tmp_path, cuda_launch_of):
    (tmp_path / "include").mkdir()
    (tmp_path / "spills.cu").write_text(SPILLS)
    with mock.patch.object(aot_cuda, "CSRC", tmp_path):
        code, log = aot_cuda.compile_source("spills", "sm_90")
    chip, spilling = chip_named("sm_90"), "_Z7crowdedPf"
    facts = describe_cubin(Cubin(code, spilling, log, 32, 1000), chip, "FFMA")
    assert facts["registers"] <= 32
    assert facts["spill_bytes"] > 0
    assert facts["spill_instructions"] > 0
    assert facts["shared_bytes"] == 1000 + 50 * 4
    assert [warning.startswith("Registers are spilled to local memory") for warning in facts["ptxas_warnings"]] == [
        True
    ]
    clean = describe_cubin(Cubin(code, "_Z5cleanPf", log, 32, 0), chip, "FFMA")
    assert (clean["spill_bytes"], clean["spill_instructions"], clean["ptxas_warnings"]) == (0, 0, [])
    launch = aot_cuda.CudaLaunch("_Z5cleanPf", "clean", 32, 0, {})
    with mock.patch.object(aot_cuda, "compile_source", return_value=(code, log)):
        rows = aot_cuda.rows_of("spills", "sm_90", {("cuda_compact", 64): launch})
    assert rows["cuda_compact", "sm_90", 64]["spilling_beside"] == [spilling]


def test_a_cuda_file_that_does_not_compile_is_a_row(tmp_path, cuda_launch_of):
    (tmp_path / "include").mkdir()
    (tmp_path / "compact.cu").write_text("int x = y;")
    launch = cuda_launch_of("cuda_compact", "sm_80", 64)
    with mock.patch.object(aot_cuda, "CSRC", tmp_path):
        rows = aot_cuda.rows_of("compact", "sm_80", {("cuda_compact", 64): launch})
    (problem,) = aot.problems(rows["cuda_compact", "sm_80", 64])
    assert problem.startswith("does not compile: nvcc: compact.cu(1): error")
    assert str(tmp_path) not in problem


@pytest.mark.slow
def test_without_nvcc_the_tool_says_so_and_fails(capsys):
    with mock.patch.dict(os.environ, GISTKERN_CUDA_ARCHS="none"):
        for arguments in ([], ["--kernel", "cuda_compact", "--arch", "sm_80"]):
            with pytest.raises(SystemExit) as stopped:
                aot.main(arguments)
            assert stopped.value.code == 2
            assert "need nvcc" in capsys.readouterr().err
        assert aot.main(["--kernel", "sum_chunks", "--arch", "sm_80", "--head-dim", "64", "--jobs", "1"]) == 0
    with pytest.raises(SystemExit):
        aot.main(["--kernel", "cuda_compact", "--arch", "gfx942"])
    assert "NVIDIA" in capsys.readouterr().err


def test_flags_are_those_of_the_extension():
    tools = aot_cuda.build_tools()
    for step in tools._nvcc_steps(Path("nvcc"), "g++"):
        assert set(aot_cuda.FLAGS) <= set(step.command)
    assert {f"sm_{arch}".rstrip("a") for arch in tools.ARCHS} == {arch for arch in ARCHS if arch.startswith("sm_")}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_committed_evidence_is_about_the_configs_of_today(committed, arch):
    for row in committed["rows"]:
        if row["arch"] == arch and row["kernel"] in KERNELS:
            launch = launch_of(row["kernel"], arch, row["head_dim"])
            assert aot.config_of(launch) == row["config"], f"{row['kernel']} D={row['head_dim']}: run `make aot`"


def test_the_cache_of_earlier_compilations_is_not_used(tmp_path):
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(tmp_path)):
        row = aot.row_of("sum_chunks", "sm_80", 64)
    assert row["registers"] > 0
    assert list(tmp_path.iterdir()) == []


def test_builds_carry_the_log_of_ptxas():
    built = aot.build(launch_of("sum_chunks", "sm_80", 64), "sm_80")
    assert isinstance(built, Build)
    assert "spill stores" in built.ptxas_log
