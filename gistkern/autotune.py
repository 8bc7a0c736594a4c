"""Measure tile configs on the device at hand and write the fastest to a JSON file (kernels/tuned.py).

python -m gistkern.autotune --out h100.json
GISTKERN_CONFIGS=h100.json python train.py

Every candidate is compiled first, in as many processes as there are processors; Triton's cache on disk hands the result
to the one that measures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gistkern.kernels.configs import KERNELS, Config, overridden, pick
from gistkern.kernels.device import facts_of
from gistkern.kernels.tuned import ENVIRONMENT, FIELDS, write

__all__ = ["candidates", "main", "tune"]

# what is timed: Llama-3-8B heads, 16K tokens in segments of 256 + 16
HEADS, KV_HEADS, ROWS, SEGMENT, GISTS, DECODE_PAST = 32, 8, 16384, 256, 16, 2048
WIDTHS = (64, 128, 256)
_NEAR = {
    "block_rows": lambda config: (config.block_rows // 2, config.block_rows, config.block_rows * 2),
    "block_cols": lambda config: (config.block_cols // 2, config.block_cols, config.block_cols * 2),
    "num_warps": lambda config: (4, 8),
    "num_stages": lambda config: range(max(1, config.num_stages - 1), config.num_stages + 2),
}


def candidates(start: Config) -> Iterator[Config]:
    """The shipped config first, then its neighbors: tiles halved and doubled, 4 or 8 warps, a stage fewer or more."""
    yield start
    for rows in _NEAR["block_rows"](start):
        for cols in _NEAR["block_cols"](start):
            for warps in _NEAR["num_warps"](start):
                for stages in _NEAR["num_stages"](start):
                    near = replace(start, block_rows=rows, block_cols=cols, num_warps=warps, num_stages=stages)
                    if near != start and min(rows, cols) >= 16:
                        yield replace(near, why="measured")


def tune(
    measure: Callable[[str, int, torch.dtype], float],
    arch: str,
    widths: Sequence[int] = WIDTHS[:2],
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    kernels: Sequence[str] = KERNELS,
) -> list[dict[str, Any]]:
    """The fastest candidate of every kernel.

    Parameters
    ----------
    measure : callable
        ``measure(kernel, width, dtype)``: milliseconds of one call under the configs in force. A candidate that
        does not fit the device or does not compile (OutOfResources, PTXASError, RuntimeError) is skipped.
    arch : str
        As in `facts_of`.
    widths, dtypes, kernels
        Head dimensions, precisions and kernels to measure.
    """
    from triton.runtime.errors import OutOfResources, PTXASError

    rows = []
    for dtype in dtypes:
        for width in widths:
            for kernel in kernels:
                best: tuple[float, Config] | None = None
                for config in candidates(pick(kernel, arch, width, dtype.itemsize)):
                    with overridden(**{kernel: config}):
                        try:
                            spent = measure(kernel, width, dtype)
                        except (OutOfResources, PTXASError, RuntimeError) as error:
                            print(f"skipped {kernel} {config}: {str(error).splitlines()[0]}")
                            continue
                    print(f"{spent:.4f} ms {kernel} {width} {[getattr(config, field) for field in FIELDS]}")
                    if best is None or spent < best[0]:
                        best = spent, config
                if best is None:
                    raise RuntimeError(f"no config of {kernel} fits {arch} at head dimension {width}, {dtype}")
                chosen = {field: getattr(best[1], field) for field in FIELDS}
                rows.append(
                    {"kernel": kernel, "width": width, "itemsize": dtype.itemsize, **chosen, "milliseconds": best[0]}
                )
    return rows


def compile_all(arch: str, widths: Sequence[int], dtypes: Sequence[torch.dtype], kernels: Sequence[str]) -> None:
    """Run every candidate once, in processes of their own, so that measuring finds all of them compiled."""
    work = [
        (kernel, width, dtype, config)
        for dtype in dtypes
        for width in widths
        for kernel in kernels
        for config in candidates(pick(kernel, arch, width, dtype.itemsize))
    ]
    with ProcessPoolExecutor(min(len(work), os.cpu_count() or 1), get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*work, strict=True)))


def _compile(kernel: str, width: int, dtype: torch.dtype, config: Config) -> None:
    # what cannot be compiled or launched is said when it is measured
    with overridden(**{kernel: config}), contextlib.suppress(Exception):
        _call(kernel, width, dtype)()


@lru_cache(maxsize=1)
def _inputs(decoding: bool, width: int, dtype: torch.dtype):
    """Layout and inputs of what is timed; drawn once for all candidates of a kernel."""
    from gistkern import GistLayout
    from gistkern.testing import make_inputs

    layout = GistLayout.from_segments([SEGMENT] * (ROWS // (SEGMENT + GISTS)), GISTS, device="cuda")
    if decoding:
        layout = GistLayout.decode(DECODE_PAST, 64, batch_size=16, device="cuda")
    return layout, make_inputs(layout, heads=HEADS, kv_heads=KV_HEADS, head_dim=width, dtype=dtype)


def _call(kernel: str, width: int, dtype: torch.dtype) -> Callable[[], Any]:
    """The call that `kernel` dominates, on the current CUDA device."""
    from gistkern import gist_attention
    from gistkern.ops import library

    layout, inputs = _inputs(kernel == "decode", width, dtype)
    leaves = tuple(inputs.leaves().values())
    if kernel == "compact":

        def both_ways() -> Any:
            rows = library.compact(inputs.k, inputs.v, None, None, layout.gather, "triton")
            return torch.autograd.grad(rows, (inputs.k, inputs.v), rows)

        return both_ways
    past = {"past_key": inputs.past_key, "past_value": inputs.past_value}
    if kernel.startswith("bwd"):
        out = gist_attention(inputs.q, inputs.k, inputs.v, layout, backend="triton")
        return lambda: torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)

    def forward() -> Any:
        with torch.no_grad():
            return gist_attention(inputs.q, inputs.k, inputs.v, layout, **past, backend="triton")

    return forward


def _measure(kernel: str, width: int, dtype: torch.dtype) -> float:
    """Median milliseconds of one call."""
    from triton.testing import do_bench

    return do_bench(_call(kernel, width, dtype), warmup=5, rep=30, return_mode="median")


def main(arguments: list[str] | None = None) -> None:
    """Tune the current CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m gistkern.autotune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--width", type=int, nargs="+", choices=WIDTHS, default=WIDTHS[:2], help="head dimensions")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    given = parser.parse_args(arguments)
    what = given.width, (torch.bfloat16,), given.kernel
    if not torch.cuda.is_available():
        raise SystemExit("autotuning measures a GPU, and torch finds none here")
    facts = facts_of(torch.device("cuda", torch.cuda.current_device()))
    compile_all(facts.arch, *what)
    write(given.out, facts.name, facts.arch, tune(_measure, facts.arch, *what))
    print(f"wrote {given.out}: use it with {ENVIRONMENT}={given.out}")


if __name__ == "__main__":
    main()
