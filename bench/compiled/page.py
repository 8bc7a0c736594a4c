"""docs/evidence/kernels.md from the report of `make aot`.

A table per chip, what the CUDA kernels' code is made of, then our Triton inner loops next to plain ones.
"""

from __future__ import annotations

from typing import Any

from bench.compiled.cuda import CUDA_KERNELS
from bench.compiled.kernels import ARCHS, PLAIN
from bench.compiled.machine_code import FORMS
from bench.markdown import left_aligned
from gistkern.kernels.chips import chip_named

__all__ = ["page"]

_INTRO = """# Kernels, compiled

Grade **compiled**: the real compiler accepted each kernel for each chip, Triton's those of `kernels/` and nvcc those of
`csrc/` (*cuda_...*), with the configs that a user's call picks, and this page says what their machine code is like.
Written by `{command}`; the numbers are in `kernels.json`.

**What this shows**: registers, spilled registers, stack, shared memory, how many blocks fit on a multiprocessor,
whether the inner loop runs on the tensor cores and copies asynchronously, and what else it executes.

**What this does not show**: time. Nothing on this page ran. Instruction counts guard against regressions; they are
no claim about speed, because instructions differ in cost and most of a kernel's time may be waiting.

{shapes}. {versions}.
"""

_COLUMNS = """Tile: query rows x key rows (query heads packed into the rows), or rows alone; then warps and pipeline
stages; in the CUDA kernels each warp has tiles of its own. Spills: bytes per thread that ptxas stores for want of
registers. Loop: tensor-core instructions in the inner loop. Blocks: resident per multiprocessor, the share of its
warps, and what limits it."""

_CUDA = """The kernels of `csrc/`, for bf16. *mma*: on tensor cores, two packed rows and more; *simt*: without, one row
or up to four (*rows*); *quantized*: int8 or e4m3 rows beside bf16 ones. The code of simt, merging and compaction is the
same for every head dimension; only the launch differs.

In the whole function: the instructions that the source asks for by name, 128-bit loads (LDG), 128-bit asynchronous
copies to shared memory (LDGSTS), ldmatrix (LDSM) and mma (HMMA). Then one turn of the inner loop on a tile that needs
no mask, in instructions per warp, and per column of keys and values: the shortest way around that passes as much
arithmetic and as many wide loads or copies as any. Where simt adds up a row over its lanes, a loop of shuffles, this
way goes past."""

_COLUMNS_AMD = """Registers: vector registers per lane (512 at most). Waves: per SIMD, as LLVM computes it."""

_LOOPS = """The same columns for a plain causal flash kernel
([plain_flash.py](../../bench/compiled/plain_flash.py): the
algorithm of FlashAttention-2 as Triton's tutorial arranges it, no gists, no documents) with the same tiles, warps and
stages, compiled the same way. One turn of the inner loop on a tile that needs no mask, ours / plain, in instructions
per warp; *mask* is what the loop holds besides: the arm that only boundary tiles take."""

_NAMES = {
    "fwd": "Forward",
    "bwd_dq": "Backward, dq",
    "bwd_dkv_gist": "Backward, dk and dv of the compact rows",
    "bwd_dkv_local": "Backward, dk and dv of the local rows",
}
_COMPARED = (
    "tensor core",
    "exp2, log2, 1/x",
    "fp32",
    "integer and addresses",
    "shared memory",
    "global memory",
    "barriers and waits",
    "branches and predicates",
    "shuffles and conversions",
)


def page(report: dict[str, Any]) -> str:
    """The page of a report."""
    rows = report["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    parts = [_INTRO.format(command=report["command"], shapes=report["shapes"], versions=versions)]
    parts.append(_exceptions([row for row in rows if row["problems"]], len(rows)))
    parts.append("## By chip\n\n" + _COLUMNS)
    parts += [_chip(arch, [row for row in rows if row["arch"] == arch and not row["plain"]]) for arch in ARCHS]
    parts.append(_cuda([row for row in rows if row["kernel"] in CUDA_KERNELS and "error" not in row]))
    parts.append("## The inner loop next to plain flash attention\n\n" + _LOOPS)
    parts += [_comparison(kernel, rows) for kernel in PLAIN if PLAIN[kernel]]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _exceptions(bad: list[dict[str, Any]], total: int) -> str:
    lines = [
        "## Gates",
        "",
        "Every row must compile, spill nothing, stay within the chip's shared memory, draw no warning about\n"
        "performance from ptxas and, in attention kernels (but *simt*), hold tensor-core instructions in the inner\n"
        "loop. CUDA decoding on tensor cores must also copy asynchronously there, 128 bits at a time, and read its\n"
        "tiles by ldmatrix, plain and transposed; the other CUDA kernels must load 128 bits at a time; and none of\n"
        "the functions compiled beside theirs (fp16, fp32, head dimension 256) may spill.\n"
        f"{total - len(bad)} of {total} rows do; the others:",
        "",
    ]
    if not bad:
        lines[2] = lines[2].replace("; the others:", ".")
        return "\n".join(lines[:3])
    cells = [
        [row["kernel"], row["arch"], row["head_dim"], "; ".join(row["problems"]), row.get("reason", "**none**")]
        for row in bad
    ]
    return "\n".join(lines) + "\n" + left_aligned(["kernel", "arch", "D", "problem", "reason"], cells)


def _chip(arch: str, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    chip = chip_named(arch)
    amd = chip.capability is None
    title = f"### {arch} ({chip.example})\n\n" + (f"{_COLUMNS_AMD}\n\n" if amd else "")
    head = ["kernel", "D", "tile", "warps", "stages", "registers", "spills", "stack", "shared KiB"]
    head += ["tensor core", "loop", "async copies", "waves" if amd else "blocks"]
    return title + left_aligned(head, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[Any]:
    config = row["config"]
    start = [row["kernel"], row["head_dim"], _tile(config), config["num_warps"], config.get("num_stages", "")]
    if "error" in row:
        return [*start, "does not compile", *[""] * 7]
    fits = row.get("waves_per_simd")
    if fits is None:
        fits = f"{row['blocks_per_multiprocessor']} ({row['occupancy_percent']:g} %, {row['occupancy_limited_by']})"
    loop = row["inner_loop"]
    return [
        *start,
        row["registers"],
        row["spill_bytes"],
        row["stack_bytes"],
        f"{row['shared_bytes'] / 1024:.1f} of {row['shared_limit'] // 1024}",
        row["tensor_core"] or "",
        (loop and loop["tensor_core_instructions"]) or "",
        row["async_copies"] or "",
        fits,
    ]


def _tile(config: dict[str, Any]) -> str:
    if "BLOCK" in config:
        return str(config["BLOCK"])
    if "BN" not in config:
        return str(config.get("BG", config.get("BM")))
    packed = f" ({config['PACK']})" if "PACK" in config else ""
    return f"{config['BM']} x {config['BN']}{packed}"


def _cuda(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    # kernel by kernel; one line for a function that serves several head dimensions
    lines: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for kernel in CUDA_KERNELS:
        for row in rows:
            if row["kernel"] == kernel:
                lines.setdefault((kernel, row["arch"], row["function"]), []).append(row)
    head = ["kernel", "arch", "D", *FORMS, "one turn", "per column", *_COMPARED]
    cells = [_cuda_cells(same) for same in lines.values()]
    return "## What the CUDA kernels' code is made of\n\n" + _CUDA + "\n\n" + left_aligned(head, cells)


def _cuda_cells(rows: list[dict[str, Any]]) -> list[Any]:
    first, loop = rows[0], rows[0]["inner_loop"]
    counts = [first["forms"][form] or "" for form in FORMS]
    start = [first["kernel"].removeprefix("cuda_"), first["arch"], ", ".join(str(row["head_dim"]) for row in rows)]
    if not loop:
        return [*start, *counts, *[""] * (2 + len(_COMPARED))]
    turn = loop["full_tile_instructions"]
    per_column = [f"{turn / row['config']['BN']:.1f}" for row in rows if "BN" in row["config"]]
    return [*start, *counts, turn, ", ".join(per_column), *[loop["full_tile"].get(name, 0) for name in _COMPARED]]


def _comparison(kernel: str, rows: list[dict[str, Any]]) -> str:
    by_key = {(row["kernel"], row["arch"], row["head_dim"]): row for row in rows}
    cells = []
    for (name, arch, dim), ours in by_key.items():
        plain = by_key.get((PLAIN[kernel], arch, dim))
        if name == kernel and plain and ours.get("inner_loop") and plain.get("inner_loop"):
            cells.append([arch, dim, _tile(ours["config"]).split(" (")[0], *_loop_cells(ours, plain)])
    if not cells:
        return ""
    head = ["arch", "D", "tile", "all", "ours : plain", *_COMPARED, "mask"]
    return f"### {_NAMES[kernel]}\n\n" + left_aligned(head, cells)


def _loop_cells(ours: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    a, b = ours["inner_loop"], plain["inner_loop"]
    total, reference = a["full_tile_instructions"], b["full_tile_instructions"]
    spills = f" ({plain['spill_bytes']} B spilled)" if plain["spill_bytes"] else ""
    classes = [f"{a['full_tile'].get(name, 0)} / {b['full_tile'].get(name, 0)}" for name in _COMPARED]
    return [
        f"{total} / {reference}{spills}",
        f"{total / reference:.2f}",
        *classes,
        str(a["instructions"] - total),
    ]
