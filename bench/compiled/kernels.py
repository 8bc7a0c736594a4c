"""What `make aot` compiles: the launches of one Llama-3-8B layer, recorded from the launchers and given to Triton.

Nothing here repeats a signature or a block size. The launchers of kernels/ run on CPU tensors as if on the named
chip, their launches are recorded instead of executed, and Triton's own binder turns the recorded arguments into the
compiler's input. So what is compiled is what a user's first call would compile.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench.compiled.plain_flash import launch_plain
from gistkern.kernels import device
from gistkern.kernels.arguments import AttentionArguments, strided
from gistkern.kernels.attn_bwd_dkv import launch_gist_attn_bwd_dkv
from gistkern.kernels.attn_bwd_dq import launch_gist_attn_bwd_dq
from gistkern.kernels.attn_fwd import launch_gist_attn_fwd
from gistkern.kernels.chips import CHIPS, Chip, chip_named
from gistkern.kernels.compact import launch_gist_compact
from gistkern.kernels.decode import launch_gist_decode
from gistkern.kernels.fold import plan_gist_fold

ARCHS = tuple(chip.arch for chip in CHIPS)
HEAD_DIMS = (64, 128)
# Llama-3-8B's heads; enough rows that the compact columns are cut into chunks and decoding into splits, because
# then the partial results are fp32, which is the heavier variant of both kernels
BATCH, HEADS, KV_HEADS, ROWS, GISTS = 1, 32, 8, 2048, 256
# the bits of the scale are no compile-time constant, and neither is anything else that depends on sizes
SCALE = 0.125
CHUNKS = 8


class Launch(NamedTuple):
    """One recorded kernel launch: ``fn[grid](*args, **kwargs)`` without the grid."""

    fn: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CompilerInput(NamedTuple):
    """What Triton's runtime hands to its compiler: constexprs and attrs are keyed by argument position."""

    fn: JITFunction
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list]
    options: dict[str, Any]


class Build(NamedTuple):
    """A compiled kernel, and the log of ptxas (empty for AMD)."""

    compiled: CompiledKernel
    ptxas_log: str


def _attention(dim: int) -> dict[str, Callable[[], Any]]:
    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty((BATCH, *shape), dtype=dtype)

    q, k, g = tensor(HEADS, ROWS, dim), tensor(KV_HEADS, ROWS, dim), tensor(KV_HEADS, GISTS, dim)
    stat = tensor(HEADS, ROWS, dtype=torch.float32)
    rule = tensor(ROWS, dtype=torch.int32)
    token, token_rule = tensor(HEADS, 1, dim), tensor(1, dtype=torch.int32)
    gather, wide = tensor(GISTS, dtype=torch.int64), tensor(KV_HEADS, GISTS, dim, dtype=torch.float32)
    how = SCALE, "ieee"
    arguments = AttentionArguments(q, k, k, g, g, rule, rule, rule, SCALE)
    step = AttentionArguments(token, k, k, g, g, token_rule, token_rule, token_rule, SCALE)
    return {
        "fwd": lambda: launch_gist_attn_fwd(arguments, "ieee"),
        "bwd_dq": lambda: launch_gist_attn_bwd_dq(q, arguments, q, stat, "ieee"),
        "bwd_dkv_gist": lambda: launch_gist_attn_bwd_dkv((q, g, g, q), (rule, rule), (stat, stat), *how),
        "bwd_dkv_local": lambda: launch_gist_attn_bwd_dkv((q, k, k, q), (rule,), (stat, stat), *how),
        "decode": lambda: launch_gist_decode(step, "ieee"),
        "compact": lambda: launch_gist_compact(k, k, None, None, gather),
        "fold": lambda: plan_gist_fold(k, 0, GISTS, CHUNKS)(k.device, strided(wide, wide), gather, (k, k), (k, k)),
        "plain_fwd": lambda: launch_plain("fwd", (q, k, k), (q, stat), *how),
        "plain_bwd_dq": lambda: launch_plain("bwd_dq", (q, k, k, q), (q, stat, stat, q), *how),
        "plain_bwd_dkv": lambda: launch_plain("bwd_dkv", (q, k, k, q), (stat, stat, k, k), *how),
    }


_CALLS = ("fwd", "bwd_dq", "bwd_dkv_gist", "bwd_dkv_local", "sum_chunks", "decode", "merge_splits")
_CALLS += ("compact", "fold", "plain_fwd", "plain_bwd_dq", "plain_bwd_dkv")
_SECOND = {"sum_chunks": "bwd_dkv_gist", "merge_splits": "decode"}
# row name -> (the call that launches it, which of that call's launches it is)
KERNELS = {name: (_SECOND.get(name, name), int(name in _SECOND)) for name in _CALLS}
# attention kernels and the plain flash kernel that does the same work under a causal mask
PLAIN = {
    "fwd": "plain_fwd",
    "bwd_dq": "plain_bwd_dq",
    "bwd_dkv_gist": "plain_bwd_dkv",
    "bwd_dkv_local": "plain_bwd_dkv",
    "decode": None,
}


def launch_of(kernel: str, arch: str, dim: int) -> Launch:
    """The launch that a call on a chip of `arch` with head dimension `dim` makes of a kernel of `KERNELS`."""
    call, index = KERNELS[kernel]
    with recorded_launches(chip_named(arch)) as launches:
        _attention(dim)[call]()
    return launches[index]


def compiler_input(launch: Launch, arch: str) -> CompilerInput:
    """The compiler's input for a launch: the steps of `triton.runtime.jit.JITFunction.run`, with the target given."""
    fn, kwargs = launch.fn, dict(launch.kwargs)
    kwargs["debug"] = fn.debug or triton.knobs.runtime.debug
    kwargs["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
    backend = make_backend(target_of(arch))
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, unbound = bind(*launch.args, **kwargs)
    options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, unbound)
    return CompilerInput(fn, signature, constexprs, attrs, dict(options.__dict__))


def build(launch: Launch, arch: str) -> Build:
    """Compile a launch for a chip. No GPU and no earlier compilation is needed or used."""
    source = compiler_input(launch, arch)
    kind = GluonASTSource if source.fn.is_gluon() else ASTSource
    ast = kind(source.fn, source.signature, source.constexprs, source.attrs)
    knobs = triton.knobs
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(ast, target=target_of(arch), options=source.options)
    return Build(compiled, log.getvalue())


def target_of(arch: str) -> GPUTarget:
    """Triton's name for an architecture."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@contextlib.contextmanager
def recorded_launches(chip: Chip) -> Iterator[list[Launch]]:
    """Launchers take CPU tensors for `chip` within the block; what they launch is listed and not run."""
    launches: list[Launch] = []

    def run(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(fn, args, kwargs))

    facts = device.DeviceFacts(chip.arch, chip.multiprocessors, chip.l2_bytes, chip.example)
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(device, "_of_chip", return_value=facts),
        mock.patch.dict(os.environ, GISTKERN_EMULATED="1"),
    ):
        yield launches
