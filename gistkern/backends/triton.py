"""Triton backend: the kernels of kernels/ behind the op, for CUDA and ROCm tensors."""

from __future__ import annotations

import torch

from gistkern.backends.hopper import HopperForward, wanted
from gistkern.backends.hopper_backward import HopperBackward
from gistkern.backends.triton_plan import TritonPlan
from gistkern.kernels.arguments import AttentionArguments
from gistkern.kernels.attn_bwd_dkv import launch_gist_attn_bwd_dkv
from gistkern.kernels.attn_bwd_dq import launch_gist_attn_bwd_dq
from gistkern.kernels.attn_fwd import launch_gist_attn_fwd
from gistkern.kernels.compact import launch_gist_compact, launch_gist_compact_into
from gistkern.kernels.decode import launch_gist_decode
from gistkern.kernels.device import products_precision
from gistkern.kernels.fold import launch_gist_compact_bwd
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.rows import dense_rows

__all__ = ["TritonPlan", "backward", "compact", "compact_backward", "compact_into", "forward"]


def forward(arguments: AttentionArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, Hq, N, D]`` and log-sum-exp ``[B, Hq, N]``."""
    arguments, precision = arguments.readable(), products_precision(arguments.q.device)
    if arguments.q.shape[2] <= DECODE_ROWS:
        return launch_gist_decode(arguments, precision)
    if wanted("fwd", *arguments.buffers):
        return HopperForward(arguments)(arguments)
    return launch_gist_attn_fwd(arguments, precision)


def backward(
    arguments: AttentionArguments, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, gist_k and gist_v, without atomics: two runs are bit-identical."""
    arguments, grad_out = arguments.readable(), dense_rows(grad_out)
    q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, scale = arguments
    if wanted("bwd", *arguments.buffers, grad_out):
        # all compact rows count as past ones, whose gradients are added to nothing
        gather = torch.empty((q.shape[0], 0), dtype=torch.int64, device=q.device)
        steps = HopperBackward(arguments, gist_k.shape[2]).steps(q.device, (*arguments.intervals, gather))
        results = tuple([torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in arguments.buffers])
        steps.run((grad_out, *arguments.buffers, out.contiguous(), lse.contiguous(), *results))
        return results
    precision = products_precision(q.device)
    dq, rows_lse, delta = launch_gist_attn_bwd_dq(grad_out, arguments, out.contiguous(), lse.contiguous(), precision)
    rest = (rows_lse, delta), scale, precision
    dgist = launch_gist_attn_bwd_dkv((q, gist_k, gist_v, grad_out), (gist_begin, gist_end), *rest)
    dlocal = launch_gist_attn_bwd_dkv((q, k, v, grad_out), (local_begin,), *rest)
    return dq, *dlocal, *dgist


def compact(
    k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor | None, past_v: torch.Tensor | None, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact rows of keys and values in one launch; arguments as `gistkern.rows`."""
    past = [None if t is None else dense_rows(t) for t in (past_k, past_v)]
    return launch_gist_compact(dense_rows(k), dense_rows(v), *past, gather.contiguous())


def compact_into(
    k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor
) -> None:
    """The gathered rows alone, written to `out_k` and `out_v`; arguments as `gistkern.rows`."""
    launch_gist_compact_into(dense_rows(k), dense_rows(v), gather.contiguous(), out_k, out_v)


def compact_backward(
    grad_gist_k: torch.Tensor, grad_gist_v: torch.Tensor, gather: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of k and v, repeated tokens added up in a fixed order; arguments as `gistkern.rows`."""
    grads = dense_rows(grad_gist_k), dense_rows(grad_gist_v)
    return launch_gist_compact_bwd(*grads, gather.contiguous(), num_local)
