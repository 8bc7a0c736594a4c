"""The CUDA C++ kernels' part of `make aot`: compiled by nvcc for every NVIDIA chip, with the launches of the host code.

Nothing here repeats a launch. csrc/testing/plan_report.cpp runs the launchers of csrc/*.cu without a GPU and reports
what they would launch: the function, its threads, its shared memory, its tile. The same layer as for Triton's kernels.
"""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from cuxray.parse import ptxasv

from bench.compiled.kernels import GISTS, HEADS, KV_HEADS, ROWS
from bench.compiled.machine_code import Cubin, describe_cubin
from gistkern.kernels.chips import chip_named

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BUILD_TOOLS = CSRC / "build_extension.py"
FLAGS = ("-std=c++17", "-O3")
# enum DecodeVariant of csrc/include/gistkern/decode.h
_SIMT = 1


class CudaKernel(NamedTuple):
    """A kernel as `make aot` lists it.

    A call of the launcher of csrc/`source`.cu, with `numbers` beyond the layer's, launches it and nothing else.
    `working` marks its inner loop (see `describe_cubin`); `needs` are the `FORMS` its code must have.
    """

    source: str
    numbers: dict[str, int]
    working: str
    needs: tuple[str, ...]


class CudaLaunch(NamedTuple):
    """What the host code launches: a function of a cubin, by its symbol and readably, and the shape of its tile."""

    symbol: str
    function: str
    threads: int
    shared_bytes: int
    config: dict[str, int]


_MMA = r"(HMMA|LDGSTS)\..*"
_WIDE = r"LDG\.E(\.\w+)*\.128(\.\w+)*"
_SIMT_LOOP = rf"FFMA(\.\w+)*|{_WIDE}"
_TILES = ("HMMA", "LDGSTS 128", "LDSM", "LDSM transposed")
# as many query heads as key/value heads leave one packed row
_ONE_ROW = {"query_heads": KV_HEADS}

CUDA_KERNELS = {
    "cuda_decode_mma": CudaKernel("decode", {}, _MMA, _TILES),
    "cuda_decode_mma_quantized": CudaKernel("decode", {"quantized": 1}, _MMA, _TILES),
    "cuda_decode_simt": CudaKernel("decode", _ONE_ROW, _SIMT_LOOP, ("LDG 128",)),
    "cuda_decode_simt_rows": CudaKernel("decode", {"variant": _SIMT}, _SIMT_LOOP, ("LDG 128",)),
    "cuda_decode_simt_quantized": CudaKernel("decode", _ONE_ROW | {"quantized": 1}, _SIMT_LOOP, ("LDG 128",)),
    "cuda_decode_simt_rows_quantized": CudaKernel(
        "decode", {"variant": _SIMT, "quantized": 1}, _SIMT_LOOP, ("LDG 128",)
    ),
    "cuda_compact": CudaKernel("compact", {}, _WIDE, ("LDG 128",)),
}


def build_tools() -> ModuleType:
    """csrc/build_extension.py, which is no part of a package: it knows where the compilers are."""
    spec = importlib.util.spec_from_file_location("gistkern_build_tools", BUILD_TOOLS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def missing() -> str | None:
    """Why the CUDA kernels cannot be compiled here, or None."""
    tools = build_tools()
    if tools.nvcc() is None:
        return "the CUDA kernels need nvcc (CUDA_HOME, the path, nvidia-cuda-nvcc; GISTKERN_CUDA_ARCHS=none hides it)"
    if tools.cxx() is None:
        return "the CUDA kernels need a C++ compiler (g++, clang++ or c++ on the path, or CXX)"
    return None


@contextlib.contextmanager
def planner() -> Iterator[Callable[[str, str, int], CudaLaunch]]:
    """Function (kernel, arch, head_dim) -> the launch that a call on a chip of `arch` makes, within the block."""
    tools = build_tools()
    flags = ("-std=c++17", "-O0", "-w", "-DGISTKERN_EMULATED", "-rdynamic")
    folders = ("-I", CSRC / "include", "-I", CSRC / "testing", "-isystem", tools.cuda_include())
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "plan_report"
        source = CSRC / "testing" / "plan_report.cpp"
        subprocess.run([tools.cxx(), *flags, *folders, source, "-o", program, "-ldl"], check=True)
        yield lambda kernel, arch, dim: _launch(program, CUDA_KERNELS[kernel], arch, dim)


def _launch(program: Path, kernel: CudaKernel, arch: str, dim: int) -> CudaLaunch:
    numbers = {"query_heads": HEADS, "kv_heads": KV_HEADS, "gist_rows": GISTS, "tail_rows": ROWS} | kernel.numbers
    numbers |= {"head_dim": dim, "multiprocessors": chip_named(arch).multiprocessors}
    words = [f"{name}={number}" for name, number in numbers.items()]
    done = subprocess.run([program, kernel.source, *words], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    (launch,) = report["launches"]
    warps = launch["threads"] // 32
    if report["columns"]:
        config = {"PACK": report["packed_rows"], "BM": report["rows"], "BN": report["columns"]}
    else:
        config = {"BG": report["rows"]}
    config["num_warps"] = warps
    if report["stages"]:
        config["num_stages"] = report["stages"]
    readable = re.search(r"gistkern::(\w+(<[^(]*>)?)\(", launch["function"])
    assert readable, launch["function"]
    return CudaLaunch(launch["symbol"], readable[1], launch["threads"], launch["shared_bytes"], config)


def compile_source(source: str, arch: str) -> tuple[bytes, str]:
    """The cubin of csrc/`source`.cu for a chip of `arch`, and what ptxas said."""
    tools = build_tools()
    # of sm_90 the variant with its own instructions (90a)
    number = next(name for name in tools.ARCHS if f"sm_{name}".rstrip("a") == arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source}.cubin"
        command = [tools.nvcc(), *FLAGS, "-ccbin", tools.cxx(), f"-arch=sm_{number}", "-cubin"]
        command += ["-Xptxas", "-v,-warn-spills", "-I", CSRC / "include", CSRC / f"{source}.cu", "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr.strip()}")
        return cubin.read_bytes(), done.stderr


def rows_of(source: str, arch: str, launches: dict[tuple[str, int], CudaLaunch]) -> dict[tuple[str, str, int], Any]:
    """Compile one file for one chip and describe these launches of it: rows by (kernel, arch, head_dim)."""
    rows: dict[tuple[str, str, int], Any] = {}
    try:
        code, log = compile_source(source, arch)
    except RuntimeError as error:
        # nvcc's own words, without this machine's paths
        facts = {"error": re.sub(r"(?:/[\w.+-]+)+/", "", str(error))}
        return {(name, arch, dim): _head(name, arch, dim, one) | facts for (name, dim), one in launches.items()}
    spilling = [name for name, found in ptxasv.parse(log).items() if found.spill_stores]
    for (kernel, dim), launch in launches.items():
        cubin = Cubin(code, launch.symbol, log, launch.threads // 32, launch.shared_bytes)
        facts = describe_cubin(cubin, chip_named(arch), CUDA_KERNELS[kernel].working)
        facts |= {"functions_beside": len(ptxasv.parse(log)) - 1}
        facts |= {"spilling_beside": [name for name in spilling if name != launch.symbol]}
        rows[kernel, arch, dim] = _head(kernel, arch, dim, launch) | facts
    return rows


def _head(kernel: str, arch: str, dim: int, launch: CudaLaunch) -> dict[str, Any]:
    head = {"kernel": kernel, "function": launch.function, "plain": False, "arch": arch, "head_dim": dim}
    return head | {"dtype": "bfloat16", "config": launch.config}


def cuda_problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row that only CUDA kernels can have: instructions they were written for are missing."""
    kernel = CUDA_KERNELS[row["kernel"]]
    found = [f"no {form} instruction" for form in kernel.needs if not row["forms"][form]]
    if "HMMA" in kernel.needs and not (row["inner_loop"] and row["inner_loop"]["async_copies"]):
        found.append("no asynchronous copy in the inner loop")
    return found + [f"{name} of the same file spills" for name in row["spilling_beside"]]
