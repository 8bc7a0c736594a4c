"""Hopper's backward compiled for sm_90 with no GPU, next to the plain backward.

    python -m bench.compiled.hopper_backward           # fills the table of docs/internals/hopper-backward.md

Compiled, not run.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.compiled import kernels
from bench.compiled.hopper import ARCH, beyond, described
from bench.compiled.kernels import BATCH, GISTS, HEADS, KV_HEADS, ROWS, SCALE, Launch, build, recorded_launches
from bench.compiled.machine_code import describe
from bench.fill import DOCS, fill
from bench.markdown import table
from gistkern.backends.hopper_backward import HopperBackward
from gistkern.kernels.arguments import AttentionArguments
from gistkern.kernels.chips import chip_named

# a kernel's place among a backward's launches, and the plain kernel that does the same
KERNELS = {"bwd_dq": 1, "bwd_dkv_gist": 2, "bwd_dkv_local": 3}
# instructions over tensor cycles of the inner loop, by head dimension
MOST_ISSUE = {64: 0.62, 128: 0.4}
# what a program needs once for each tile and the loop does not: bytes of a thread's stack
MOST_STACK = 48


def launch_of(kernel: str, dim: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
    """The launch of a kernel of `KERNELS` that a call would make."""

    def tensor(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty((BATCH, *shape), dtype=of)

    q, k, g = tensor(HEADS, ROWS, dim), tensor(KV_HEADS, ROWS, dim), tensor(KV_HEADS, GISTS, dim)
    lse, rule = tensor(HEADS, ROWS, of=torch.float32), tensor(ROWS, of=torch.int32)
    gather = tensor(GISTS, of=torch.int64)
    with recorded_launches(chip_named(ARCH)) as launches:
        made = HopperBackward(AttentionArguments(q, k, k, g, g, rule, rule, rule, SCALE), 0)
        work = [torch.empty(count) for count in made.work]
        buffers = made.buffers(q, q, k, k, g, g, q, lse, q, k, k, k, k, rule, rule, rule, gather, *work)
        for launch, given in zip(made.launches, buffers, strict=True):
            launch(q.device, *given)
    return launches[KERNELS[kernel]]


def row_of(kernel: str, dim: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Compile one kernel and describe it."""
    return {"kernel": kernel, "head_dim": dim} | described(launch_of(kernel, dim, dtype))


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row."""
    dim = row["head_dim"]
    return beyond(row, MOST_STACK if dim == 128 else 0, MOST_ISSUE[dim])


def lines() -> Iterator[list[Any]]:
    """Of the table."""
    for dim in (64, 128):
        for kernel in KERNELS:
            row = row_of(kernel, dim)
            plain = describe(build(kernels.launch_of(kernel, ARCH, dim), ARCH), chip_named(ARCH))["inner_loop"]
            loop = row["inner_loop"]
            yield [
                *(dim, kernel, row["registers"], row["stack_bytes"], round(row["shared_bytes"] / 1024)),
                *(loop["full_tile_instructions"], loop["issue_per_tensor_cycle"], plain["issue_per_tensor_cycle"]),
                "; ".join(problems(row)) or "-",
            ]


def tables() -> dict[str, str]:
    """The table of docs/internals/hopper-backward.md."""
    head = ["D", "kernel", "registers", "stack", "KiB shared", "turn", "issue / tensor", "plain", "problems"]
    return {"hopper backward": table(head, list(lines()))}


if __name__ == "__main__":
    fill(DOCS / "internals" / "hopper-backward.md", tables())
    sys.exit(0)
