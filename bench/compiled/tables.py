"""The tables of docs/evidence/kernels.md: every kernel at head dimension 128; the rest is in the report."""

from collections.abc import Mapping
from typing import Any

from bench.compiled.cuda import CUDA_KERNELS
from bench.compiled.kernels import ARCHS, KERNELS, PLAIN
from bench.compiled.machine_code import FORMS
from bench.markdown import measured_on, table

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
