"""Hopper's own kernels compiled for sm_90 with no GPU: the tiles that ship, and the variants a clock may prefer.

    python -m bench.compiled.hopper           # fills the table of docs/internals/hopper.md

Compiled, not run. The kernels and their launches are those of a user's call, recorded as kernels.py records the others.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from bench.compiled.kernels import BATCH, GISTS, HEADS, KV_HEADS, ROWS, SCALE, Launch, build, recorded_launches
from bench.compiled.machine_code import describe
from bench.fill import DOCS, fill
from bench.markdown import table
from bench.variants import VARIANTS, Variant
from gistkern.backends.hopper import HopperForward
from gistkern.kernels import configs
from gistkern.kernels.arguments import AttentionArguments
from gistkern.kernels.chips import chip_named

ARCH = "sm_90"
# of the forward's inner loop at head dimension 128, instructions over tensor cycles (`issue_per_tensor_cycle`)
MOST_ISSUE = 0.62
# what is the same for all tiles of a program and leaves the registers to the loop: bytes of a thread's stack
MOST_STACK = 32


def launch_of(variant: Variant, dtype: torch.dtype = torch.bfloat16) -> Launch:
    """The launch of the forward that a call would make with this tile."""
    dim = variant.head_dim

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty((BATCH, *shape), dtype=of)

    q, k, g = tensor(HEADS, ROWS, dim), tensor(KV_HEADS, ROWS, dim), tensor(KV_HEADS, GISTS, dim)
    rule = tensor(ROWS, of=torch.int32)
    arguments = AttentionArguments(q, k, k, g, g, rule, rule, rule, SCALE)
    row = configs.HopperConfig(variant.block_cols, variant.num_stages, True, "compiled")
    with (
        mock.patch.dict(configs.HOPPER, {("fwd", dim): row}),
        recorded_launches(chip_named(ARCH)) as launches,
    ):
        HopperForward(arguments)(arguments)
    return launches[-1]


def row_of(variant: Variant, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Compile the forward with this tile, and describe it."""
    return variant._asdict() | described(launch_of(variant, dtype))


def described(launch: Launch) -> dict[str, Any]:
    """Compile a launch of Hopper's, and describe it: as `describe`, and how many copies by TMA it has."""
    made = build(launch, ARCH)
    return describe(made, chip_named(ARCH)) | {"tma": made.compiled.asm["ptx"].count("cp.async.bulk.tensor")}


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row; that of a variant that does not ship may be."""
    return beyond(row, MOST_STACK, MOST_ISSUE if row["head_dim"] == 128 else math.inf)


def beyond(row: dict[str, Any], most_stack: int, most_issue: float) -> list[str]:
    """What is wrong with a kernel of Hopper's that may take so many bytes of stack and instructions a tensor cycle."""
    loop, found = row["inner_loop"], []
    if not (loop and loop["tensor_core_instructions"]):
        return ["no products in a loop"]
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"{row['shared_bytes']} bytes of shared memory")
    if spilled := loop["full_tile"].get("local memory (spills)"):
        found.append(f"{spilled} spills in the loop")
    if row["stack_bytes"] > most_stack:
        found.append(f"{row['stack_bytes']} bytes of stack")
    if not row["tma"]:
        found.append("no copies by TMA")
    if loop["issue_per_tensor_cycle"] > most_issue:
        found.append(f"{loop['issue_per_tensor_cycle']} instructions a tensor cycle")
    # "wgmma.mma_async instructions are serialized due to ..."
    return found + [f"ptxas: {warning}" for warning in row["ptxas_warnings"]]


def lines() -> Iterator[list[Any]]:
    """Of the table."""
    for variant in VARIANTS:
        row = row_of(variant)
        loop = row["inner_loop"]
        yield [
            *(variant.head_dim, f"{variant.block_cols} x {variant.num_stages}{', ships' if variant.ships else ''}"),
            *(row["registers"], row["stack_bytes"], round(row["shared_bytes"] / 1024), loop["full_tile_instructions"]),
            *(loop["issue_per_tensor_cycle"], "; ".join(problems(row)) or "-"),
        ]


def tables() -> dict[str, str]:
    """The table of docs/internals/hopper.md."""
    head = ["D", "columns x stages", "registers", "stack", "KiB shared", "turn", "issue / tensor", "problems"]
    return {"hopper": table(head, list(lines()))}


if __name__ == "__main__":
    fill(DOCS / "internals" / "hopper.md", tables())
    sys.exit(0)
