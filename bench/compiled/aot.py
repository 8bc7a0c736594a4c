"""Compile every kernel for every chip with no GPU, check the machine code, and write it up.

    make aot                                              # everything, to docs/internals/compiled.{json,md}
    python -m bench.compiled.aot --arch sm_90 --kernel fwd         # some of it, gates only
    python -m bench.compiled.aot --kernel cuda_decode_mma          # of the CUDA kernels, which need nvcc
    python -m bench.compiled.aot --arch sm_90 --out /tmp/aot       # some of it, written up elsewhere

Compiled, not run: nothing here says how long a kernel takes.
"""

import argparse
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from bench.compiled.cuda import CUDA_KERNELS, CudaLaunch, build_tools, cuda_problems, missing, planner, rows_of
from bench.compiled.kernels import ARCHS, HEAD_DIMS, HEADS, KERNELS, KV_HEADS, PLAIN, Launch, build, launch_of
from bench.compiled.machine_code import FORMS, describe
from bench.fill import DOCS, fill
from bench.markdown import measured_on, table
from bench.rows import write_report
from gistkern.kernels import tuned
from gistkern.kernels.chips import chip_named

PAGES = DOCS / "internals"
# constexprs that are choices of ours, for the config column
_CHOSEN = ("PACK", "BM", "BN", "BG", "BLOCK")


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: it does not compile, spills, misses the tensor cores or asks for too much memory."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spill_bytes"] or row["spill_instructions"]:
        found.append(f"spills {row['spill_bytes']} bytes per thread ({row['spill_instructions']} instructions)")
    loop = row["inner_loop"]
    cuda = CUDA_KERNELS.get(row["kernel"])
    on_tensor_cores = "HMMA" in cuda.needs if cuda else row["kernel"] in PLAIN or row["plain"]
    if on_tensor_cores and not (loop and loop["tensor_core_instructions"]):
        found.append("no tensor-core instruction in a loop")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, the chip has {row['shared_limit']}")
    if cuda:
        found += cuda_problems(row)
    return found + [f"ptxas: {warning}" for warning in row.get("ptxas_warnings", ())]


def check(rows: list[dict[str, Any]]) -> list[str]:
    """Put `problems` into the rows; returns what fails. Plain kernels, in tiles made for ours, only have to compile."""
    failures = []
    for row in rows:
        row["problems"] = problems(row)
        if row["problems"] and ("error" in row or not row["plain"]):
            failures.append(f"{row['kernel']} on {row['arch']}, D={row['head_dim']}: {'; '.join(row['problems'])}")
    return failures


def row_of(kernel: str, arch: str, dim: int, launch: Launch | None = None) -> dict[str, Any]:
    """Compile one kernel and describe it; `launch` replaces the launch that a user's call would make."""
    launch = launch or launch_of(kernel, arch, dim)
    row: dict[str, Any] = {
        "kernel": kernel,
        "function": launch.fn.__name__,
        "plain": kernel.startswith("plain_"),
        "arch": arch,
        "head_dim": dim,
        "dtype": "bfloat16",
        "config": config_of(launch),
    }
    try:
        return row | describe(build(launch, arch), chip_named(arch))
    except Exception as error:  # the compiler's own failures are of many types, and each is a row's result
        # Triton's front end says where in the first line and why in the last, with the source in between
        said = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        text = " ".join([type(error).__name__, *dict.fromkeys(said[:1] + said[-1:])])
        return row | {"error": re.sub(r"(?:/[\w.+-]+)+/", "", text)}  # without this machine's paths


def config_of(launch: Launch) -> dict[str, int]:
    """What of a launch is a choice of ours: tile sizes, packed heads, warps and pipeline stages."""
    constants = launch.kwargs | (launch.kwargs["META"]._asdict() if "META" in launch.kwargs else {})
    return {name: constants[name] for name in (*_CHOSEN, "num_warps", "num_stages") if name in constants}


def every_row() -> list[tuple[str, str, int]]:
    """(kernel, arch, head_dim) of every row of the evidence; the CUDA kernels are for NVIDIA's chips."""
    of_arch = {arch: (*KERNELS, *(CUDA_KERNELS if chip_named(arch).capability else ())) for arch in ARCHS}
    return [(kernel, arch, dim) for arch in ARCHS for kernel in of_arch[arch] for dim in HEAD_DIMS]


DIM = 128
CUDA_ARCH = "sm_90"

Row = Mapping[str, Any]


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """By name, of the report of `make aot`."""
    rows = report["rows"]
    found = {(row["kernel"], row["arch"]): row for row in rows if row["head_dim"] == DIM and "error" not in row}
    ours = [name for name in (*KERNELS, *CUDA_KERNELS) if not name.startswith("plain_")]
    bad = [row for row in rows if row["problems"]]
    return {
        "compiled by": f"{measured_on(report)} {report['shapes']}. {len(rows) - len(bad)} of {len(rows)} rows pass.",
        "exceptions": table(
            ["kernel", "arch", "D", "problem"],
            [[row["kernel"], row["arch"], row["head_dim"], "; ".join(row["problems"])] for row in bad],
            4,
        ),
        "chips": table(
            ["kernel", *ARCHS], [[name, *(_chip(found.get((name, arch))) for arch in ARCHS)] for name in ours]
        ),
        "loops": table(
            ["kernel", *ARCHS],
            [
                [name, *(_against(found.get((name, arch)), found.get((plain, arch))) for arch in ARCHS)]
                for name, plain in PLAIN.items()
                if plain
            ],
        ),
        "cuda": table(
            ["kernel", *FORMS, "one turn"],
            [
                [name, *(row["forms"][form] or "-" for form in FORMS), _turn(row) or "-"]
                for name in CUDA_KERNELS
                for row in [found.get((name, CUDA_ARCH))]
                if row
            ],
        ),
    }


def _chip(row: Row | None) -> str:
    """Registers, KiB of shared memory, and what fits at a time."""
    if row is None:
        return "-"
    fits = row.get("waves_per_simd") or row["blocks_per_multiprocessor"]
    return f"{row['registers']}, {row['shared_bytes'] / 1024:.0f}, {fits}"


def _against(ours: Row | None, plain: Row | None) -> str:
    if not (ours and plain and (turn := _turn(ours)) and (other := _turn(plain))):
        return "-"
    return f"{turn} / {other} = {turn / other:.2f}"


def _turn(row: Row) -> int:
    """Instructions of one turn of the inner loop on a tile that needs no mask; 0 without such a loop."""
    return row["inner_loop"]["full_tile_instructions"] if row.get("inner_loop") else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*KERNELS, *CUDA_KERNELS]
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--kernel", nargs="+", choices=names, default=names)
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--out", type=Path, help="where to write (default: docs/internals if everything is compiled)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    args = parser.parse_args(arguments)
    if os.environ.get(tuned.ENVIRONMENT):
        parser.error(f"unset {tuned.ENVIRONMENT}: this is about the configs that the package ships")
    asked = {(kernel, arch, dim) for arch in args.arch for kernel in args.kernel for dim in args.head_dim}
    wanted = [key for key in every_row() if key in asked]
    if not wanted:
        parser.error("CUDA kernels are for NVIDIA's chips")
    if any(kernel in CUDA_KERNELS for kernel, _, _ in wanted) and (reason := missing()):
        parser.error(f"{reason}; --kernel {' '.join(KERNELS)} does without")
    rows = _compile_all(wanted, args.jobs)
    failures = check(rows)
    everything = len(wanted) == len(every_row())
    if out := args.out or (PAGES if everything else None):
        out.mkdir(parents=True, exist_ok=True)
        report = _report(rows)
        write_report(out / "compiled.json", report)
        fill(out / "compiled.md", tables(report))
        print(f"{len(rows)} rows written to {out}/compiled.json and compiled.md")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    print(f"{len(rows)} rows: {len(failures)} failures")
    return bool(failures)


def _compile_all(wanted: list[tuple[str, str, int]], jobs: int) -> list[dict[str, Any]]:
    """Rows in the order of `wanted`."""
    files = _cuda_files([key for key in wanted if key[0] in CUDA_KERNELS])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=context) as pool:
        # csrc/decode.cu takes longest
        futures = [pool.submit(rows_of, name, arch, files[name, arch]) for name, arch in sorted(files, reverse=True)]
        futures += [pool.submit(_triton_row, *key) for key in wanted if key[0] in KERNELS]
        rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        for future in tqdm(as_completed(futures), total=len(futures), desc="compile", unit="build", disable=None):
            rows |= future.result()
    return [rows[key] for key in wanted]


def _triton_row(*key: Any) -> dict[tuple[str, str, int], dict[str, Any]]:
    return {key: row_of(*key)}


def _cuda_files(wanted: list[tuple[str, str, int]]) -> dict[tuple[str, str], dict[tuple[str, int], CudaLaunch]]:
    """What to compile, (source, arch), and the launches to describe of each."""
    files: dict[tuple[str, str], dict[tuple[str, int], CudaLaunch]] = {}
    if wanted:
        with planner() as launch_of_cuda:
            for kernel, arch, dim in wanted:
                file = files.setdefault((CUDA_KERNELS[kernel].source, arch), {})
                file[kernel, dim] = launch_of_cuda(kernel, arch, dim)
    return files


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    tools = triton.knobs.nvidia
    nvcc = build_tools().nvcc() if any(row["kernel"] in CUDA_KERNELS for row in rows) else None
    return {
        "grade": "compiled",
        "command": "make aot",
        "versions": {
            "triton": triton.__version__,
            "python": platform.python_version(),
            "ptxas": _version(tools.ptxas.path),
            "ptxas, sm_100 and later": _version(tools.ptxas_blackwell.path),
            **({"nvcc and its ptxas": _version(nvcc)} if nvcc else {}),
        },
        "shapes": f"{HEADS} query heads, {KV_HEADS} key/value heads, bfloat16; decoding with one query row",
        "rows": rows,
    }


def _version(tool: str) -> str:
    said = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"V(\d+(\.\d+)+)", said)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    sys.exit(main())
