"""The warp-specialized backward of Hopper: its tensor maps and launches. hopper.py says which calls it serves."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch

from gistkern.backends.hopper import MappedSteps, tensor_map
from gistkern.kernels.arguments import AttentionArguments
from gistkern.kernels.device import facts_of
from gistkern.kernels.fold import plan_gist_fold
from gistkern.kernels.launch import Launch
from gistkern.kernels.schedule import chunk_count, pack_lanes, section_heads

__all__ = ["HopperBackward"]

# lanes of query rows or columns of a warpgroup; two of them share a tile
HALF = 64
TILE = 2 * HALF
# rows of the keys' and values' copies of dq, each from one buffer
BOX = 16
# stages of the rings: what shared memory has beside two tiles of rows (one in use, one under way) or one of columns
ROW_STAGES, COLUMN_STAGES = {64: 4, 128: 2}, 4
WARPS = 4


class HopperBackward:
    """A backward for tensors of one kind: a table of what its tiles visit, dq, compact columns, local columns, fold.

    Parameters
    ----------
    arguments : AttentionArguments
        Tensors like the calls'.
    past : int
        Compact rows that no token of the call has written.

    Attributes
    ----------
    launches : tuple of Launch
        In order; their buffers are `buffers`.
    work : tuple of int
        Elements of the workspace, as `Steps` takes them.
    """

    def __init__(self, arguments: AttentionArguments, past: int) -> None:
        from gistkern.kernels.hopper.bwd_dkv import DkvMeta, sm90_gist_attn_bwd_dkv_kernel
        from gistkern.kernels.hopper.bwd_dq import DqMeta, sm90_gist_attn_bwd_dq_kernel
        from gistkern.kernels.hopper.bwd_work import FIELDS, WorkMeta, sm90_gist_attn_bwd_work_kernel

        q, k, _, gist_k, _ = arguments.buffers
        batch, heads, rows, dim = q.shape
        kv_heads, columns, gists = k.shape[1], k.shape[2], gist_k.shape[2]
        group, facts, itemsize = heads // kv_heads, facts_of(q.device), q.element_size()
        self.pack = pack = pack_lanes(group)
        self.folds, self.kind = gists > 0, (q.dtype, gist_k.shape)
        packs, kv_total, positions, scale = batch * heads // pack, batch * kv_heads, TILE // pack, arguments.scale
        row_tiles, local_tiles, gist_tiles = ceil(rows / positions), ceil(columns / TILE), ceil(gists / TILE)
        tiles = row_tiles + local_tiles + gist_tiles
        chunks = chunk_count(gist_tiles * kv_total, rows, facts.multiprocessors)
        # a tensor map's strides are whole 16 bytes
        self.stats_shape, self.stats_stride = (2, packs, rows * pack), ceil(rows * pack / 4) * 4
        sums = (chunks * gist_k.numel(),) * 2 if self.folds else ()
        self.work = (batch * tiles * FIELDS, 2 * packs * self.stats_stride, *sums)

        def launch(kernel: Any, units: int, numbers: tuple[Any, ...], meta: Any) -> Launch:
            return Launch(kernel, min(facts.multiprocessors, units), numbers, {"META": meta}, WARPS)

        table = WorkMeta(positions, 1 << (positions - 1).bit_length())
        sizes = rows, columns, gists, row_tiles, local_tiles, gist_tiles
        work = Launch(sm90_gist_attn_bwd_work_kernel, batch * tiles, sizes, {"META": table}, WARPS)
        section = section_heads(packs, 2 * (columns + gists) * dim * itemsize, facts.l2_bytes)
        by_rows = scale, rows, columns - rows, self.stats_stride, row_tiles, packs, section, tiles
        dq_meta = DqMeta(heads, group, pack, dim, ROW_STAGES[dim])
        dq = launch(sm90_gist_attn_bwd_dq_kernel, row_tiles * packs, by_rows, dq_meta)
        section = section_heads(kv_total, 2 * rows * group * dim * itemsize, facts.l2_bytes)
        meta = DkvMeta(heads, group, pack, dim, COLUMN_STAGES, GIST=False)
        by_local = scale, rows, columns, columns - rows, local_tiles, kv_total, section, 1, row_tiles, tiles
        local = launch(sm90_gist_attn_bwd_dkv_kernel, local_tiles * kv_total, by_local, meta)
        if not self.folds:
            self.launches: tuple[Launch, ...] = work, dq, local
            return
        units, at = gist_tiles * kv_total * chunks, row_tiles + local_tiles
        by_gists = scale, rows, gists, 0, gist_tiles, kv_total, section, chunks, at, tiles
        gist = launch(sm90_gist_attn_bwd_dkv_kernel, units, by_gists, meta._replace(GIST=True))
        self.of_parts = torch.empty(gist_k.shape, device="meta").stride()[:3]
        self.launches = work, dq, gist, local, plan_gist_fold(k, past, gists, chunks)

    def steps(self, device: torch.device, vectors: tuple[torch.Tensor, ...]) -> MappedSteps:
        """The launches on gist_begin, gist_end, local_begin and gather, run with the tensors that `buffers` takes."""
        steps = MappedSteps(device, vectors, self.work, self.buffers)
        for launch in self.launches:
            steps.add(launch, *self.kind)
        return steps

    def buffers(self, *values: Any) -> tuple[tuple[Any, ...], ...]:
        """Those of each launch."""
        grad_out, q, k, v, gist_k, gist_v, out, lse, dq, dk, dv, past_k, past_v, *rest = values
        begin, end, start, gather, table, stats, *sums = rest
        of_q, of_grad, of_out, of_dq = map(self._lanes, (q, grad_out, out, dq))
        rule, lanes = (begin, end, start), (of_q, of_grad, self._of_stats(stats))
        seen = (k, v, gist_k, gist_v) if self.folds else (k, v, k, v)  # then not read
        boxes = [tensor_map(tensor, (1, 1, BOX)) for tensor in seen]
        by_rows = of_q, of_grad, of_out, *boxes, of_dq, lse, stats, rule, table
        by_columns = *lanes, *(tensor_map(tensor, (1, 1, HALF)) for tensor in (k, v, dk, dv)), (start, start), table
        if not self.folds:
            return (table, rule), by_rows, by_columns
        by_gists = (
            *lanes,
            *(tensor_map(tensor, (1, 1, HALF)) for tensor in (gist_k, gist_v)),
            *sums,
            (begin, end),
            table,
        )
        fold = tuple([(part, self.of_parts) for part in sums]), gather, (past_k, past_v), (dk, dv)
        return (table, rule), by_rows, by_gists, by_columns, fold

    def _lanes(self, tensor: torch.Tensor) -> Any:
        """Query rows ``[B, H, N, D]`` in boxes of 64 lanes: positions, and at each the heads of a pack."""
        return tensor_map(tensor, (1, HALF // self.pack, self.pack), (0, 2, 1))

    def _of_stats(self, stats: torch.Tensor) -> Any:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
        strides = [self.stats_shape[1] * self.stats_stride, self.stats_stride, 1]
        return TensorDescriptor(stats, list(self.stats_shape), strides, [1, 1, HALF], layout)
