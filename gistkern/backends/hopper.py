"""The warp-specialized forward of Hopper: which calls it serves, its tensor maps, its launches.

`GISTKERN_HOPPER` decides between these kernels and the plain ones, of forward and backward alike.
"""

from __future__ import annotations

import os
from math import ceil
from typing import Any

import torch

from gistkern.kernels.arguments import AttentionArguments
from gistkern.kernels.configs import pick_hopper
from gistkern.kernels.device import facts_of
from gistkern.kernels.launch import Launch, Steps
from gistkern.kernels.schedule import pack_lanes, section_heads

__all__ = ["ENVIRONMENT", "HopperForward", "MappedSteps", "reason_against", "tensor_map", "wanted"]

ENVIRONMENT = "GISTKERN_HOPPER"
_CHOICES = ("auto", "always", "never")
# of a tensor map's addresses and strides, in bytes
_ALIGNMENT = 16
# rows of one copy of keys or values
_BOX = 16
# lanes of query rows of a warpgroup; two of them share a tile
_HALF = 64
_WORK_WARPS = 4


def wanted(direction: str, q: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether Hopper's own kernels compute the ``"fwd"`` or ``"bwd"`` of a call with these ``[B, H, R, D]`` tensors.

    Raises
    ------
    ValueError
        If GISTKERN_HOPPER is none of ``auto``, ``always`` and ``never``.
    RuntimeError
        If it is ``always`` and they cannot; says why.
    """
    choice = os.environ.get(ENVIRONMENT) or "auto"
    if choice not in _CHOICES:
        raise ValueError(f"{ENVIRONMENT}={choice!r}: expected one of {', '.join(_CHOICES)}")
    if choice == "never":
        return False
    if choice == "auto" and (facts_of(q.device).arch != "sm_90" or not pick_hopper(direction, q.shape[3]).chosen):
        return False
    reason = reason_against(q, *others)
    if reason is not None and choice == "always":
        raise RuntimeError(f"{ENVIRONMENT}=always, but Hopper's kernels need {reason}")
    return reason is None


def reason_against(q: torch.Tensor, *others: torch.Tensor) -> str | None:
    """What Hopper's kernels need and a call with these tensors has not, or None if they can serve it."""
    arch = facts_of(q.device).arch
    if arch != "sm_90":
        return f"a Hopper GPU (sm_90), not {arch}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"float16 or bfloat16, not {q.dtype}"
    if q.shape[3] not in (64, 128):
        return f"a head dimension of 64 or 128, not {q.shape[3]}"
    if not all(_mappable(tensor) for tensor in (q, *others) if tensor.numel()):
        return f"rows that lie dense, at addresses and strides in multiples of {_ALIGNMENT} bytes"
    return None


def _mappable(tensor: torch.Tensor) -> bool:
    """Whether TMA reaches the rows of a ``[B, H, R, D]`` tensor; it takes no stride of 0 either."""
    step = _ALIGNMENT // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride % step == 0 for stride in strides)
    return aligned and tensor.stride(3) == 1 and tensor.data_ptr() % _ALIGNMENT == 0


def tensor_map(tensor: torch.Tensor, box: tuple[int, ...], order: tuple[int, ...] = (0, 1, 2)) -> Any:
    """What TMA copies boxes of rows of a ``[B, H, R, D]`` tensor through, with its first dimensions in this order."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    dim, shape = tensor.shape[3], [tensor.shape[axis] for axis in order]
    # the stride of a dimension of one element may be anything, but not to a tensor map
    strides = [tensor.stride(axis) if tensor.shape[axis] > 1 else dim for axis in order]
    return TensorDescriptor(tensor, [*shape, dim], [*strides, 1], [*box, dim], layout)


class MappedSteps(Steps):
    """Steps with tensor maps: addresses alone do not make one, so Triton launches them until a `PlannedCall` does."""

    def run(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Launch on `tensors`."""
        work = self.workspace(tensors[0].device)
        if self._prepares and not self.prepared:
            self._prepare(tensors, work)
        buffers = self.buffers_of(*self.arguments(tensors, work))
        for (launch, _), given in zip(self.launches, buffers, strict=True):
            launch(self.device, *given)


class HopperForward:
    """Attention of one call, or of calls like it: a table of what its tiles visit, and the kernel that reads it.

    Attributes
    ----------
    launches : tuple of Launch
        In order; their buffers are `buffers`.
    work : tuple of int
        Elements of the workspace, as `Steps` takes them.
    """

    def __init__(self, arguments: AttentionArguments) -> None:
        from gistkern.kernels.hopper.fwd import WARPS, FwdMeta, sm90_gist_attn_fwd_kernel
        from gistkern.kernels.hopper.fwd_work import FIELDS, WorkMeta, sm90_gist_attn_fwd_work_kernel

        q, k, _, gist_k, _ = arguments.buffers
        batch, heads, rows, dim = q.shape
        local, gists, group, facts = k.shape[2], gist_k.shape[2], heads // k.shape[1], facts_of(q.device)
        tile = pick_hopper("fwd", dim)
        self.has_gists, self.pack = gists > 0, pack_lanes(group)
        positions = _HALF // self.pack
        tiles, packs = ceil(rows / (2 * positions)), batch * heads // self.pack
        section = section_heads(packs, 2 * (local + gists) * dim * q.element_size(), facts.l2_bytes)
        block = 1 << (2 * positions - 1).bit_length()
        columns, stages = tile.block_cols, tile.num_stages
        work = {"META": WorkMeta(positions, block, columns)}
        meta = {"META": FwdMeta(heads, group, self.pack, dim, columns, stages)}
        numbers = arguments.scale, rows, local - rows, tiles, packs, section
        programs = min(tiles * packs, facts.multiprocessors)
        self.launches = (
            Launch(sm90_gist_attn_fwd_work_kernel, batch * tiles, (rows, local, tiles), work, _WORK_WARPS),
            Launch(sm90_gist_attn_fwd_kernel, programs, numbers, meta, WARPS),
        )
        self.work = (batch * tiles * FIELDS,)

    def buffers(self, seen: tuple[Any, ...], out: Any, lse: Any, rule: tuple[Any, ...], table: Any) -> tuple[Any, ...]:
        """Those of each launch; seen: q, k, v, gist_k and gist_v."""
        q, *rows = seen
        if not self.has_gists:
            rows[2:] = rows[:2]  # not read
        lanes = [tensor_map(tensor, (1, _HALF // self.pack, self.pack), (0, 2, 1)) for tensor in (q, out)]
        boxes = [tensor_map(tensor, (1, 1, _BOX)) for tensor in rows]
        return (table, rule), (lanes[0], *boxes, lanes[1], lse, rule, table)

    def __call__(self, arguments: AttentionArguments) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and LSE, by Triton's front end."""
        q = arguments.q
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        table = torch.empty(self.work, dtype=torch.float32, device=q.device)
        calls = self.buffers(arguments.buffers, out, lse, arguments.intervals, table)
        for launch, buffers in zip(self.launches, calls, strict=True):
            launch(q.device, *buffers)
        return out, lse
