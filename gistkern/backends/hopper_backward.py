"""The warp-specialized backward of Hopper: which calls it serves, its tensor maps, its launches."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gistkern.backends.planned import GIVEN, RESULT, PlannedCall, planned_call
from gistkern.kernels.device import facts_of
from gistkern.kernels.fold import plan_gist_fold
from gistkern.kernels.hopper.bwd_dkv import DkvMeta, sm90_gist_attn_bwd_dkv_kernel
from gistkern.kernels.hopper.bwd_dq import DqMeta, sm90_gist_attn_bwd_dq_kernel
from gistkern.kernels.hopper.bwd_work import FIELDS, WorkMeta, sm90_gist_attn_bwd_work_kernel
from gistkern.kernels.launch import Launch, Steps
from gistkern.kernels.schedule import chunk_count, section_heads

__all__ = ["HopperBackward", "reason_against"]

# of a tile of rows or columns: two warpgroups of 64
TILE = 128
# rows of the keys' and values' copies of dq, which lie in one buffer each
BOX = 16
# stages of the rings: what shared memory has beside two tiles of rows (one in use, one under way) or one of columns
ROW_STAGES, COLUMN_STAGES = {64: 4, 128: 2}, 4
MOST_PACKED = 16
# of the partition that stands first: a warpgroup
WARPS = 4
_ALIGNMENT = 16


def reason_against(grad_out: torch.Tensor, q: torch.Tensor, *keys: torch.Tensor) -> str | None:
    """Why these kernels cannot serve a call with such tensors; None if they can."""
    if facts_of(q.device).arch != "sm_90":
        return "not a Hopper GPU (sm_90)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}: only float16 and bfloat16"
    if q.shape[3] not in (64, 128):
        return f"head dimension {q.shape[3]}: only 64 and 128"
    for tensor in (grad_out, q, *keys):
        if tensor.numel() and not _mappable(tensor):
            return "a tensor map needs addresses and strides of whole 16 bytes"
    return None


def _mappable(tensor: torch.Tensor) -> bool:
    """Whether TMA reaches the rows of a ``[B, H, R, D]`` tensor: it takes no stride of 0 either."""
    step = _ALIGNMENT // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride % step == 0 for stride in strides)
    return aligned and tensor.stride(3) == 1 and tensor.data_ptr() % _ALIGNMENT == 0


class HopperBackward:
    """The launches of a backward for tensors of one kind: work table, dq, compact columns, local columns, fold.

    Parameters
    ----------
    tensors : tuple of Tensor
        grad_out, q, k, v, gist_k and gist_v as the calls bring them; out and lse are contiguous.
    vectors : tuple of Tensor
        gist_begin, gist_end, local_begin and gather, which stay as they are.
    past : int
        Compact rows that no token of the call has written.
    scale : float
        Of the scores.
    key : tuple
        What the caller tells the tensors' kind by.

    Attributes
    ----------
    call : PlannedCall or None
        The same in one call of the extension, which makes the tensor maps much faster than Triton does.
    """

    def __init__(
        self,
        tensors: tuple[torch.Tensor, ...],
        vectors: tuple[torch.Tensor, ...],
        past: int,
        scale: float,
        key: tuple[Any, ...] = (),
    ) -> None:
        self.key, self.has_past = key, past > 0
        self.call: PlannedCall | None = None
        _, q, k, _, gist_k, _ = tensors
        batch, heads, rows, dim = q.shape
        kv_heads, columns, gists = k.shape[1], k.shape[2], gist_k.shape[2]
        group, facts, itemsize = heads // kv_heads, facts_of(q.device), q.element_size()
        self.pack = pack = min(group & -group, MOST_PACKED)
        packs, kv_total, self.folds = batch * heads // pack, batch * kv_heads, gists > 0
        tiles = ceil(rows / (TILE // pack)), ceil(columns / TILE), ceil(gists / TILE)
        n_table = sum(tiles)
        chunks = chunk_count(tiles[2] * kv_total, rows, facts.multiprocessors)
        # a tensor map's strides are whole 16 bytes
        self.stats_shape, self.stats_stride = (2, packs, rows * pack), ceil(rows * pack / 4) * 4
        sums = (chunks * gist_k.numel(),) * 2 if self.folds else ()
        work = batch * n_table * FIELDS, 2 * packs * self.stats_stride, *sums
        self.steps = _Steps(q.device, vectors, work, self.buffers)
        kind = q.dtype, dim, pack

        def add(kernel: Any, units: int, numbers: tuple[Any, ...], meta: Any) -> None:
            programs = min(facts.multiprocessors, units)
            self.steps.add(Launch(kernel, programs, numbers, {"META": meta}, WARPS), kind)

        sizes = rows, columns, gists, *tiles
        positions = TILE // pack
        work_meta = {"META": WorkMeta(positions, 1 << (positions - 1).bit_length())}
        self.steps.add(Launch(sm90_gist_attn_bwd_work_kernel, batch * n_table, sizes, work_meta, WARPS))
        section = section_heads(packs, 2 * (columns + gists) * dim * itemsize, facts.l2_bytes)
        of_rows = scale, rows, columns - rows, self.stats_stride, tiles[0], packs, section, n_table
        add(sm90_gist_attn_bwd_dq_kernel, tiles[0] * packs, of_rows, DqMeta(heads, group, pack, dim, ROW_STAGES[dim]))
        section = section_heads(kv_total, 2 * rows * group * dim * itemsize, facts.l2_bytes)
        meta = DkvMeta(heads, group, pack, dim, COLUMN_STAGES, GIST=True)
        if self.folds:
            order = tiles[2], kv_total, section, chunks, tiles[0] + tiles[1], n_table
            units = tiles[2] * kv_total * chunks
            add(sm90_gist_attn_bwd_dkv_kernel, units, (scale, rows, gists, 0, *order), meta)
        order = tiles[1], kv_total, section, 1, tiles[0], n_table
        numbers = scale, rows, columns, columns - rows, *order
        add(sm90_gist_attn_bwd_dkv_kernel, tiles[1] * kv_total, numbers, meta._replace(GIST=False))
        if self.folds:
            self.of_parts = torch.empty(gist_k.shape, device="meta").stride()[:3]
            self.steps.add(plan_gist_fold(k, past, gists, chunks), q.dtype, self.of_parts)

    def run(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Launch on grad_out, q, k, v, gist_k, gist_v, out and lse, to write dq, dk, dv and those of the past rows."""
        self.steps.run(tensors)
        if self.call is None and self.steps.prepared:
            past = (RESULT, RESULT) if self.has_past else (9, 10)  # dk and dv, where no row is written
            self.call = planned_call(self.steps, tensors, (*[GIVEN] * 8, RESULT, RESULT, RESULT, *past))

    def buffers(self, *values: Any) -> tuple[tuple[Any, ...], ...]:
        """Those of each launch."""
        grad_out, q, k, v, gist_k, gist_v, out, lse, dq, dk, dv, past_k, past_v, *rest = values
        begin, end, start, gather, table, stats, *sums = rest
        of_q, of_grad, of_out, of_dq = map(self._lanes, (q, grad_out, out, dq))
        strides = self.stats_shape[1] * self.stats_stride, self.stats_stride, 1
        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
        of_stats = TensorDescriptor(stats, list(self.stats_shape), list(strides), [1, 1, TILE // 2], layout)
        rule, lanes = (begin, end, start), (of_q, of_grad, of_stats)
        seen = (k, v, gist_k, gist_v) if self.folds else (k, v, k, v)  # then not read
        boxes = [_rows(tensor, BOX) for tensor in seen]
        work = table, rule
        by_rows = of_q, of_grad, of_out, *boxes, of_dq, lse, stats, rule, table
        by_columns = *lanes, *(_rows(tensor, TILE // 2) for tensor in (k, v, dk, dv)), (start, start), table
        if not self.folds:
            return work, by_rows, by_columns
        by_gists = *lanes, *(_rows(tensor, TILE // 2) for tensor in (gist_k, gist_v)), *sums, (begin, end), table
        fold = tuple([(part, self.of_parts) for part in sums]), gather, (past_k, past_v), (dk, dv)
        return work, by_rows, by_gists, by_columns, fold

    def _lanes(self, tensor: torch.Tensor) -> TensorDescriptor:
        """Query rows ``[B, H, N, D]`` in boxes of 64 lanes: positions, and at each the heads of a pack."""
        return _map(tensor, (0, 2, 1), [1, TILE // 2 // self.pack, self.pack])


def _rows(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    return _map(tensor, (0, 1, 2), [1, 1, rows])


def _map(tensor: torch.Tensor, order: tuple[int, ...], box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    dim, shape = tensor.shape[3], [tensor.shape[axis] for axis in order]
    # the stride of a dimension of one element may be anything, but not to a tensor map
    strides = [tensor.stride(axis) if tensor.shape[axis] > 1 else dim for axis in order]
    return TensorDescriptor(tensor, [*shape, dim], [*strides, 1], [*box, dim], layout)


class _Steps(Steps):
    """Steps with tensor maps: Triton launches them, since addresses alone do not make one."""

    def run(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Launch on `tensors`."""
        work = self.workspace(self.device)
        buffers = self.buffers_of(*self.arguments(tensors, work))
        if self._prepares and self._kernels is None:
            self._prepare(tensors, work)
        for (launch, _), given in zip(self.launches, buffers, strict=True):
            launch(self.device, *given)
