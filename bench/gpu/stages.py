"""The stages of `make gpu`, each in a process of its own: ``python -m bench.gpu.stages NAME GRID``.

A stage is a section of reports (`bench.measured.sections`) or one of the four here. Its rows go to standard output,
one as JSON a line as soon as it is known; whatever else is printed goes where errors go.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.attention.flex_attention import flex_attention

from bench.gpu import hopper as own
from bench.measured import flex
from bench.measured.decoding import by_operators
from bench.measured.grid import GRIDS, Grid
from bench.measured.sections import SECTIONS, Rows
from bench.measured.timing import spent
from bench.shapes import HEADS, layout_of
from bench.variants import VARIANTS
from gistkern import GistLayout, backends, gist_attention
from gistkern.backends import reference
from gistkern.testing import Inputs, assert_within_budget, compare, make_inputs

# seconds; together less than eight minutes. Those of sections that are not here: `OTHERS`, when they are named
LIMITS = {"suite": 135, "checks": 45, "hopper": 40, "queueing": 25, "compressing": 45, "decoding": 35, "models": 30}
LIMITS |= {"generating": 30, "attention": 50, "tiles": 20, "training": 25}
OTHERS = 300
ROUNDS = 5
EMULATED = {"TRITON_INTERPRET": "1", "GISTKERN_EMULATED": "1"}
# of the suite, what a rehearsal runs
FEW = ["tests/gpu/test_kernel_compact.py", "-k", "opcheck"]
PER_PROCESS = 8 << 30  # bytes of a GPU's memory for each process of the suite
CHECKED = ("64/4", "512/8", "hierarchical", "packed", "sliding", "one segment")


def suite(grid: Grid, device: str, rounds: int) -> Rows:
    """tests/gpu in processes side by side: counts by file, which later rows of the same file replace."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-vv", "-p", "no:cacheprovider", "-n"]
    if device == "cuda":
        memory = torch.cuda.mem_get_info()[1] // PER_PROCESS
        command += [str(max(1, min(os.cpu_count() or 1, memory))), "tests/gpu"]
    else:
        command += ["2", *FEW]
    environment = os.environ | (EMULATED if device == "cpu" else {}) | {"OMP_NUM_THREADS": "1"}
    counts: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout or ():
            print(line, end="")  # into the log
            test, outcome = (
                re.search(r"(tests/\S+\.py)::\S+", line),
                re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line),
            )
            if test is None or outcome is None or line.startswith(("FAILED", "ERROR")):  # the last is the summary
                continue
            row = counts.setdefault(test[1], {"file": test[1], "passed": 0, "skipped": 0, "failed": []})
            if outcome[1] in ("FAILED", "ERROR"):
                row["failed"].append(test[0])
            else:
                row[outcome[1].lower()] += 1
            yield row | {"seconds": time.perf_counter() - start}
    if process.returncode:
        raise RuntimeError(f"pytest ended with {process.returncode}")


def checks(grid: Grid, device: str, rounds: int) -> Rows:
    """Attention and decoding at sizes beyond the suite's, against the fp64 reference within the error budgets."""
    rows, decoding, heads = grid.checks
    for name in CHECKED:
        layout = layout_of(name, rows).to(device)
        sizes = dict(zip(("heads", "kv_heads", "head_dim"), HEADS[heads], strict=True))
        inputs = make_inputs(layout, **sizes, dtype=torch.bfloat16)
        yield _checked(f"{name}, {rows:,} rows, plan", compare, inputs, layout)
        yield _checked(f"{name}, {rows:,} rows, operators", by_operators(compare), inputs, layout)
        if _is_hopper(device):
            with own.choosing("always", sizes["head_dim"]):
                yield _checked(f"{name}, {rows:,} rows, Hopper's own kernels", compare, inputs, layout)
        if layout.plain:  # `compare` asks for the LSE, which torch's kernel does not hand back
            yield _checked(f"{name}, {rows:,} rows, nothing hidden", _plain, inputs, layout)
    for gists, tail, batch in decoding:
        for backend in ("cuda", "triton") if device == "cuda" else ("auto",):
            what = f"decoding {gists:,} + {tail} rows of {batch} samples, {backend}"
            yield _checked(what, _decoded, gists, tail, batch, backend, heads, device)


def _is_hopper(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def hopper(grid: Grid, device: str, rounds: int) -> Rows:
    """Hopper's own kernels beside the plain ones, of which a rehearsal, or another chip, has the latter only."""
    if not _is_hopper(device):
        small = device == "cpu"
        rows, heads = (60, (2, 1)) if small else (own.ROWS, own.HEADS)
        yield from own.rows_of(("one segment", "512/8"), rows, heads, (), device)
        return
    variants = [one for one in VARIANTS if one.head_dim == 128]
    yield from own.rows_of(own.NAMES, own.ROWS, own.HEADS, variants, device)


def _plain(inputs: Inputs, layout: GistLayout) -> None:
    chosen = backends.choose("auto", inputs.q, True, plain=True)
    assert inputs.q.device.type == "cpu" or chosen == "torch", f"{chosen} is chosen where nothing is hidden"

    def results(given: Inputs, attend: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        tensors = given.q, given.k, given.v
        out = attend(*tensors, layout)
        return out.detach(), *torch.autograd.grad(out, tensors, given.grad_out)

    def oracle(*given: Any) -> torch.Tensor:
        return reference.from_layout(*given)[0]

    exact, rounded = (results(inputs.cast(kind), oracle) for kind in (torch.float64, inputs.q.dtype))
    for name, *values in zip(("out", "dq", "dk", "dv"), results(inputs, gist_attention), exact, rounded, strict=True):
        assert_within_budget(name, *values, factor=2.0 if name == "out" else 3.0)


def _checked(what: str, check: Callable[..., None], *given: Any) -> dict[str, Any]:
    start = time.perf_counter()
    row: dict[str, Any] = {"check": what}
    try:
        check(*given)
    except (AssertionError, RuntimeError) as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return row | {"seconds": time.perf_counter() - start}


@torch.no_grad()
def _decoded(gists: int, tail: int, batch: int, backend: str, heads: str, device: str) -> None:
    query_heads, kv_heads, dim = HEADS[heads]
    layout = GistLayout.decode(gists, tail, batch_size=batch, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(count: int, rows: int) -> torch.Tensor:
        return torch.randn(batch, count, rows, dim, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v = draw(query_heads, 1), draw(kv_heads, tail + 1), draw(kv_heads, tail + 1)
    past = draw(kv_heads, gists), draw(kv_heads, gists)
    found = gist_attention(q, k, v, layout, past_key=past[0], past_value=past[1], backend=backend)
    exact, plain = (
        reference.from_layout(*(t.to(kind) for t in (q, k, v)), layout, past=tuple(t.to(kind) for t in past))[0]
        for kind in (torch.float64, torch.bfloat16)
    )
    assert_within_budget("out", found, exact, plain, 2.0)


def tiles(grid: Grid, device: str, rounds: int) -> Rows:
    """The shipped tiles of head dimension 128 (a rehearsal's: 64) beside their nearest neighbors."""
    from gistkern import autotune
    from gistkern.kernels.configs import pick
    from gistkern.kernels.device import facts_of

    rows, kernels = grid.tiles
    heads, dtype = HEADS["Llama-3-8B" if device == "cuda" else "2 heads, D 64"], torch.bfloat16
    layout = layout_of("256/16", rows).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter's products
    sizes = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
    inputs = make_inputs(layout, **sizes, dtype=dtype)
    arch = facts_of(torch.device(device)).arch
    times: dict[tuple[Any, ...], float] = {}

    def measure(kernel: str, width: int, dtype: torch.dtype) -> float:
        leaves = inputs.q, inputs.k, inputs.v
        out = gist_attention(*leaves, layout, backend="triton")
        call = (lambda: gist_attention(*leaves, layout, backend="triton")) if kernel == "fwd" else None
        call = call or (lambda: torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True))
        call()
        config = pick(kernel, arch, width, dtype.itemsize)
        times[kernel, config] = 1e3 * min(spent(call, device, queued=True) for _ in range(rounds))
        return times[kernel, config]

    def nearest(start: Any) -> Iterator[Any]:
        fields = ("block_rows", "block_cols", "num_warps", "num_stages")
        near = (one for one in every(start) if sum(getattr(one, f) != getattr(start, f) for f in fields) <= 1)
        return itertools.islice(near, 2 if device == "cpu" else 9)

    every = autotune.candidates
    with mock.patch.object(autotune, "candidates", nearest):
        if device == "cuda":
            autotune.compile_all(arch, (heads[2],), (dtype,), kernels)
        for kernel in kernels:
            shipped = pick(kernel, arch, heads[2], dtype.itemsize)
            for row in autotune.tune(measure, arch, (heads[2],), (dtype,), (kernel,)):
                yield row | {"of the shipped": row["milliseconds"] / times[kernel, shipped]}


STAGES: dict[str, Callable[[Grid, str, int], Rows]] = {
    **{"suite": suite, "checks": checks, "hopper": hopper, "tiles": tiles},
    **SECTIONS,
}


def main(name: str, grid: str) -> None:
    """Run a stage: exit status 1 if a row has failed."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device, failed = ("cpu" if grid == "rehearsal" else "cuda"), False
    if device == "cpu":  # compiling takes minutes; its own Python path computes the same
        flex._compiled = lambda: flex_attention
    for row in STAGES[name](GRIDS[grid], device, 1 if device == "cpu" else ROUNDS):
        failed |= bool(row.get("failed"))
        print(json.dumps(row), file=rows, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
