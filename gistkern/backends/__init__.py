"""The backend table: each row says what serves a call, and why it cannot where it cannot.

Adding a backend is one row here and one module with `forward`, `backward`, `compact`, `compact_into` and
`compact_backward`; one that serves only layouts which hide nothing (`plain_only`) has `attend` instead.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from gistkern.backends import native
from gistkern.kernels.device import emulated, facts_of
from gistkern.kernels.schedule import DECODE_ROWS

__all__ = ["BACKENDS", "Backend", "choose", "get"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# searched once, at import: this is asked at every call, and torch 2.11 cannot compile a function that caches its answer
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _always() -> str | None:
    return None


def _needs_cpu(q: torch.Tensor) -> str | None:
    return None if q.device.type == "cpu" else f"serves CPU tensors, got {q.device}"


def _needs_triton() -> str | None:
    return None if _HAS_TRITON else "needs Triton, which is not installed: pip install 'gistkern[triton]'"


def _needs_cuda(q: torch.Tensor) -> str | None:
    # under an emulator (docs/internals/evidence.md) kernel launches take CPU tensors
    if q.device.type != "cuda" and not emulated():
        return f"serves CUDA and ROCm tensors, got {q.device}"
    if q.dtype == torch.float64:
        return "computes float16, bfloat16 and float32: pass one of them, or backend='reference' for float64"
    if q.dim() == 4 and q.shape[-1] > 256:
        return f"has kernels for head dimensions up to 256, got {q.shape[-1]}"
    if q.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"needs compute capability 8.0 or newer, {q.device} has {torch.cuda.get_device_capability(q.device)}"
    return None


# head dimensions up to which torch's flash kernel has a backward on every chip; without it torch forms an N x N tensor
_TORCH_HEAD_DIM = 192


def _needs_torch_kernels(q: torch.Tensor) -> str | None:
    if not q.is_cuda:
        return f"serves CUDA and ROCm tensors, got {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"computes float16 and bfloat16, not {q.dtype}: take backend='triton'"
    if q.dim() == 4 and q.shape[-1] > _TORCH_HEAD_DIM:
        return f"serves head dimensions up to {_TORCH_HEAD_DIM}, got {q.shape[-1]}: take backend='triton'"
    if torch.are_deterministic_algorithms_enabled():
        return "may differ from run to run, and torch.use_deterministic_algorithms is on: take backend='triton'"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "needs torch's flash kernel, which torch.backends.cuda or sdpa_kernel has turned off"
    if not _has_flash(q.device):
        return f"needs a chip that torch's flash kernel runs on, which {q.device} is not"
    return None


@functools.cache
def _has_flash(device: torch.device) -> bool:
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return facts_of(device).arch in ("gfx90a", "gfx942")


def _needs_half_or_single(q: torch.Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"serves CPU tensors, got {q.device}"
    if q.dtype == torch.float64:
        return "computes float16, bfloat16 and float32: pass one of them, or backend='sdpa' for float64"
    return None


def _needs_decoding(q: torch.Tensor) -> str | None:
    if q.device.type != "cuda" and not (emulated() and native.cuda_archs() == "emulated"):
        return f"serves CUDA tensors, got {q.device}"
    if q.dtype == torch.float64:
        return "computes float16, bfloat16 and float32, not float64"
    if q.dim() == 4 and q.shape[2] > DECODE_ROWS:
        return (
            f"decodes: up to {DECODE_ROWS} query rows a sequence, got {q.shape[2]}; backend='triton' takes any number"
        )
    if q.dim() == 4 and q.shape[-1] > 256:
        return f"has kernels for head dimensions up to 256, got {q.shape[-1]}"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"needs compute capability 8.0 or newer, {q.device} has {torch.cuda.get_device_capability(q.device)}"
    return None


def _needs_full_precision(q: torch.Tensor) -> str | None:
    if q.dtype in (torch.float32, torch.float64):
        return None
    return f"is the specification and computes in its inputs' precision: pass float32 or float64, not {q.dtype}"


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Parameters
    ----------
    name : str
        As in ``gist_attention(..., backend=name)``.
    module : str
        Imported on first use; offers `forward` and `backward`, which take `AttentionArguments`.
    automatic : bool
        Whether ``backend="auto"`` may pick it. Rows are tried in the order of the table.
    what : str
        One line for the doctor.
    missing : callable
        Why this installation cannot run it at all, or None.
    refuses : callable
        Why it cannot serve this query tensor, or None.
    differentiable : bool
        Whether it has a `backward`.
    plain_only : bool
        Whether it serves only layouts that hide nothing (`GistLayout.plain`), and hands back no LSE.
    """

    name: str
    module: str
    automatic: bool
    what: str
    missing: Callable[[], str | None]
    refuses: Callable[[torch.Tensor], str | None]
    differentiable: bool = True
    plain_only: bool = False

    def reason(
        self, q: torch.Tensor, gradient: bool = False, *, plain: bool = False, lse: bool = False, sinks: bool = False
    ) -> str | None:
        """Why this backend cannot serve `q`, and what else the call wants (see `choose`); None if it can."""
        if self.plain_only:  # asked at every layer, most of which it does not serve: the cheapest questions first
            if not plain:
                return "serves layouts that hide nothing (GistLayout.plain), which this one is not known to be"
            if lse:
                return "hands back no log-sum-exp (return_lse)"
            if sinks:
                return "takes no learned sinks"
        if (reason := self.missing() or self.refuses(q)) or self.differentiable or not gradient:
            return reason
        return "has no backward: call it under torch.no_grad(), or use backend='triton'"

    def load(self) -> ModuleType:
        """Import the module that serves it."""
        return sys.modules.get(self.module) or importlib.import_module(self.module)


BACKENDS = (
    Backend(
        name="torch",
        module="gistkern.backends.plain",
        automatic=True,
        what="torch's own causal attention (cuDNN or flash), where the layout hides nothing; not bit-reproducible",
        missing=_always,
        refuses=_needs_torch_kernels,
        plain_only=True,
    ),
    Backend(
        name="cuda",
        module="gistkern.backends.cuda",
        automatic=True,
        what="the extension's CUDA kernels: decoding (shared, paged and quantized rows too) and compaction",
        missing=native.missing_cuda,
        refuses=_needs_decoding,
        differentiable=False,
    ),
    Backend(
        name="triton",
        module="gistkern.backends.triton",
        automatic=True,
        what="fused kernels: one loop over gist columns, then local columns; decoding and compaction too",
        missing=_needs_triton,
        refuses=_needs_cuda,
    ),
    Backend(
        name="cpu",
        module="gistkern.backends.cpu",
        automatic=True,
        what="the extension's CPU kernels: forward, backward and decoding in fp32, AVX-512 or AVX2",
        missing=native.missing,
        refuses=_needs_half_or_single,
    ),
    Backend(
        name="sdpa",
        module="gistkern.backends.sdpa",
        automatic=True,
        what="flash-style blocks through torch's CPU flash kernel; serves where the extension is missing, and float64",
        missing=_always,
        refuses=_needs_cpu,
    ),
    Backend(
        name="reference",
        module="gistkern.backends.reference",
        automatic=False,
        what="dense fp32/fp64 specification, quadratic memory; for tests",
        missing=_always,
        refuses=_needs_full_precision,
    ),
)


def get(name: str) -> Backend:
    """The row called `name`; ValueError if there is none."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {', '.join(b.name for b in BACKENDS)}")


def choose(
    name: str, q: torch.Tensor, gradient: bool = False, *, plain: bool = False, lse: bool = False, sinks: bool = False
) -> str:
    """Name of the backend that serves `q`; with `gradient` also its backward.

    `plain`: the layout hides nothing (`GistLayout.plain`). `lse`, `sinks`: the log-sum-exp is wanted, learned sinks are
    given.

    Raises
    ------
    ValueError
        For an unknown name.
    RuntimeError
        If the named backend, or with ``"auto"`` every backend, cannot serve the call; says why.
    """
    if q.dtype not in _FLOATS:
        raise ValueError(f"gist_attention takes float16, bfloat16, float32 or float64, got {q.dtype}")
    if name != "auto":
        backend = get(name)
        if reason := backend.reason(q, gradient, plain=plain, lse=lse, sinks=sinks):
            raise RuntimeError(f"backend {name!r} {reason}")
        return name
    reasons = []
    for backend in BACKENDS:
        if not backend.automatic:
            continue
        reason = backend.reason(q, gradient, plain=plain, lse=lse, sinks=sinks)
        if reason is None:
            return backend.name
        reasons.append(f"{backend.name} {reason}")
    raise RuntimeError(f"no backend can serve {q.dtype} on {q.device}: {'; '.join(reasons)}")
