"""What the operators of `gistkern.ops` ask of their tensors, at every call, compiled or not: one ValueError.

Values are read where they lie on the CPU. On a GPU that would wait for it: `gist_attention` looks at each layout once
(`gistkern.layout.checks.check_once`). Backends whose kernels check by themselves (`CHECKED` in their module, the
extension's in csrc/bindings.cpp) are called first and asked why afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from gistkern.kernels.arguments import AttentionArguments
from gistkern.layout.checks import check_bounds, check_gather

__all__ = [
    "FIXED_SCALES",
    "call",
    "check_attention",
    "check_backward",
    "check_compact",
    "check_compact_backward",
    "check_compact_into",
    "check_devices",
    "check_folded_backward",
    "check_scale",
    "refuse_forward_mode",
    "refuse_second_derivative",
]

# types of scales that a key of prepared calls may hold as they are; a tensor's value may change
FIXED_SCALES = {float, int, type(None)}
# of scores, as float32: one that rounds to 0 or infinity would make every probability NaN
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126


def call(module: ModuleType, name: str, check: Callable[..., None], *arguments: Any) -> Any:
    """Function `name` of a backend on arguments that `check` lets pass."""
    compute = getattr(module, name, None)
    if compute is None:
        raise RuntimeError(f"the backend of {module.__name__} has no {name}: take another for the operators")
    if name not in getattr(module, "CHECKED", ()):
        check(*arguments)
        return compute(*arguments)
    try:
        return compute(*arguments)
    except Exception:
        check(*arguments)
        raise


def check_scale(scale: float) -> None:
    """Raise ValueError for a scale that is no positive number, or none in float32."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale}")
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise ValueError(f"scale must lie in 2^-126..2^126, which float32 holds, got {scale}")


def check_attention(arguments: AttentionArguments) -> None:
    """Of `gistkern.ops.library.attention`."""
    q, k, v, gist_k, gist_v, *intervals, scale = arguments
    for name, tensor in (("q", q), ("k", k), ("gist_k", gist_k)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, rows, head_dim], got {tuple(tensor.shape)}")
    batch, heads, rows, dim = q.shape
    kv_heads, local_rows = k.shape[1:3]
    if not batch or not rows or not dim:
        raise ValueError(f"q has {batch} samples of {rows} rows of {dim} elements: there is nothing to attend")
    if not kv_heads or not heads or heads % kv_heads:
        raise ValueError(f"query heads ({heads}) must be a positive multiple of key/value heads ({kv_heads})")
    if not rows <= local_rows < 2**31 or gist_k.shape[2] >= 2**31:
        raise ValueError(
            f"k must have the {rows} rows of q at least and fewer than 2^31, gist_k fewer than 2^31, "
            f"got {local_rows} and {gist_k.shape[2]}"
        )
    local, gist = (batch, kv_heads, local_rows, dim), (batch, kv_heads, gist_k.shape[2], dim)
    _require("k", k, local, q)
    _require("v", v, local, q)
    _require("gist_k", gist_k, gist, q)
    _require("gist_v", gist_v, gist, q)
    for name, vector in zip(("gist_begin", "gist_end", "local_begin"), intervals, strict=True):
        _require(name, vector, (batch, rows), q, torch.int32)
    check_scale(scale)
    if q.device.type == "cpu":
        begin, end, local_begin = (vector.numpy() for vector in intervals)
        check_bounds(begin, end, local_begin, gist_k.shape[2], local_rows)


def check_backward(arguments: AttentionArguments, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Of `gistkern.ops.attention_backward`."""
    check_attention(arguments)
    q = arguments.q
    _require("grad_out", grad_out, tuple(q.shape), q)
    _require("out", out, tuple(q.shape), q)
    _require("lse", lse, tuple(q.shape[:3]), q, torch.promote_types(q.dtype, torch.float32))


def check_folded_backward(
    arguments: AttentionArguments, gather: torch.Tensor, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Of a backend's `folded_backward`."""
    check_backward(arguments, grad_out, out, lse)
    batch, rows, width = arguments.k.shape[0], arguments.k.shape[2], arguments.gist_k.shape[2]
    _require_gather(gather, batch, rows, arguments.q)
    if gather.shape[1] > width:
        raise ValueError(f"gather must list at most the {width} compact rows, got {gather.shape[1]}")


def check_compact(
    k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, gather: torch.Tensor
) -> None:
    """Of `gistkern.ops.compact`."""
    if k.dim() != 4:
        raise ValueError(f"k must be [batch, heads, rows, head_dim], got {tuple(k.shape)}")
    batch, heads, rows, dim = k.shape
    _require("v", v, tuple(k.shape), k)
    if (past_k is None) != (past_v is None):
        raise ValueError("past_k and past_v go together: pass both or neither")
    if past_k is not None and past_v is not None:
        past = past_k.shape[2] if past_k.dim() == 4 else 0
        _require("past_k", past_k, (batch, heads, past, dim), k)
        _require("past_v", past_v, (batch, heads, past, dim), k)
    _require_gather(gather, batch, rows, k)


def check_compact_into(
    k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor
) -> None:
    """Of a backend's `compact_into`."""
    check_compact(k, v, None, None, gather)
    shape = (*k.shape[:2], gather.shape[1], k.shape[3])
    _require("out_k", out_k, shape, k)
    _require("out_v", out_v, shape, k)


def check_compact_backward(
    grad_gist_k: torch.Tensor, grad_gist_v: torch.Tensor, gather: torch.Tensor, num_local: int
) -> None:
    """Of `gistkern.ops.compact_backward`."""
    if grad_gist_k.dim() != 4:
        raise ValueError(f"grad_gist_k must be [batch, heads, rows, head_dim], got {tuple(grad_gist_k.shape)}")
    if not 0 <= num_local < 2**31:
        raise ValueError(f"num_local must lie in 0..2^31 - 1, got {num_local}")
    batch, heads, _, dim = grad_gist_k.shape
    _require_gather(gather, batch, num_local, grad_gist_k)
    for name, tensor in (("grad_gist_k", grad_gist_k), ("grad_gist_v", grad_gist_v)):
        _require(name, tensor, (batch, heads, gather.shape[1], dim), grad_gist_k)


def _require(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], first: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    dtype = first.dtype if dtype is None else dtype
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != first.device:
        raise ValueError(
            f"{name} must be {dtype} {shape} on {first.device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def _require_gather(gather: torch.Tensor, batch: int, rows: int, first: torch.Tensor) -> None:
    width = gather.shape[1] if gather.dim() == 2 else 0
    _require("gather", gather, (batch, width), first, torch.int64)
    if gather.device.type != "cpu" or not width:
        return
    check_gather(gather.numpy(), rows)


def check_devices(first: torch.Tensor, *others: Any) -> None:
    """Raise ValueError unless all tensors are on one device; in the shape functions too, which `meta` tensors reach."""
    for tensor in others:
        if torch.is_tensor(tensor) and tensor.device != first.device:
            raise ValueError(f"tensors are on {first.device} and {tensor.device}: use one device")


def refuse_forward_mode(*tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError where a tensor carries a tangent (`torch.func.jvp`): the result would have none, silently."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # no tangents anywhere
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError("gistkern has no forward-mode derivatives (jvp, jacfwd): use reverse mode (backward, vjp)")


def refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    """What stands in place of a backward's own derivative: RuntimeError."""
    raise RuntimeError(
        "gist_attention is not twice differentiable: its backward has no derivative. For second derivatives use "
        "gistkern.backends.reference.forward, which plain autograd differentiates"
    )
