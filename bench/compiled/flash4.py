"""FlashAttention-4's Hopper kernels under the mask rule, compiled without a GPU and read as ours are.

    pip install --pre --no-deps --target build/flash4 flash-attn-4 apache-tvm-ffi quack-kernels torch-c-dlpack-ext \
        einops nvidia-cutlass-dsl{,-libs-base,-libs-core,-libs-cu12}==4.8.1 cuda-{python,bindings,pathfinder,core}
    PYTHONPATH=build/flash4:build/flash4/nvidia_cutlass_dsl/dsl_packages python -m bench.compiled.flash4

Compiled, not run. Its chip is read from the environment when it is imported, so this is a process of its own.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.compiled.kernels import HEADS, KV_HEADS
from bench.compiled.machine_code import Cubin, describe_cubin
from bench.markdown import table
from bench.measured import flash4
from bench.shapes import layout_of
from gistkern.kernels.chips import chip_named

ARCH, DIM = "sm_90", 128
LAYOUT = "512/8", 4096


class Found(NamedTuple):
    """What a kernel of theirs costs; `issue` as `bench.compiled.machine_code.issue_per_tensor_cycle`."""

    kernel: str
    registers: int
    spill_bytes: int
    turn: int
    issue: float


def compiled(folder: Path) -> Iterator[tuple[str, Path]]:
    """Forward and backward by name, and the PTX that its compiler leaves in `folder`."""
    os.environ |= {"FLASH_ATTENTION_ARCH": ARCH, "CUTE_DSL_ARCH": f"{ARCH}a", "CUTE_DSL_KEEP_PTX": "1"}
    os.environ |= {"CUTE_DSL_DUMP_DIR": str(folder), "FLASH_ATTENTION_NUM_SMS": str(chip_named(ARCH).multiprocessors)}
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    layout = layout_of(*LAYOUT)
    options = flash4.options_of(layout)
    keys, rows = layout.num_compact + layout.num_rows, layout.num_rows

    def like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return like(*tensor.shape, dtype=tensor.dtype)

    with FakeTensorMode():
        q, k, v = like(1, rows, HEADS, DIM), like(1, keys, KV_HEADS, DIM), like(1, keys, KV_HEADS, DIM)
        rule: dict[str, Any] = {"mask_mod": options["mask_mod"], "aux_tensors": list(map(fake, options["aux_tensors"]))}
        blocks, transposed = (
            lists._replace(**{name: fake(one) for name, one in lists._asdict().items() if torch.is_tensor(one)})
            for lists in (options["block_sparse_tensors"], options["block_sparse_tensors_bwd"])
        )
        _flash_attn_fwd(q, k, v, block_sparse_tensors=blocks, pack_gqa=False, return_lse=True, **rule)
        yield "forward", *folder.glob("*flash_fwd_sm90*.ptx")
        lse = like(1, HEADS, rows, dtype=torch.float32)
        _flash_attn_bwd(q, k, v, q, q, lse, block_sparse_tensors=transposed, **rule)
        yield "backward", *folder.glob("*flash_bwd_sm90*.ptx")


def described(name: str, ptx: Path) -> Found:
    """By the newer of Triton's two ptxas, as its PTX asks for: its compiler keeps no log of its own."""
    text = ptx.read_text()
    function = re.search(r"\.entry (\S+?)\(", text)
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", text)
    assert function
    assert threads
    cubin = ptx.with_suffix(".made")
    command = [triton.knobs.nvidia.ptxas_blackwell.path, "-v", f"-arch={ARCH}a", str(ptx), "-o", str(cubin)]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    row = describe_cubin(Cubin(cubin.read_bytes(), function[1], log, int(threads[1]) // 32, 0), chip_named(ARCH))
    loop = row["inner_loop"]
    return Found(
        name, row["registers"], row["spill_bytes"], loop["full_tile_instructions"], loop["issue_per_tensor_cycle"]
    )


def main() -> int:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [described(*one) for one in compiled(Path(folder))]
    print(table(list(Found._fields), [list(row) for row in rows], 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
