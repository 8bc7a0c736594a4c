"""What travels together: the arguments of a call, and how a launch hands them to a kernel (kernels.md, Arguments).

No Triton here: every backend takes these.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch

from gistkern.kernels.configs import Config, pick
from gistkern.kernels.device import facts_of, wide_rows
from gistkern.kernels.schedule import pack_heads, padded, section_heads
from gistkern.rows import KeyValueRows, dense_rows

__all__ = ["AttentionArguments", "DecodeArguments", "Meta", "PoolWrite", "row_tiles", "strided"]


class AttentionArguments(NamedTuple):
    """The arguments of one attention call: shapes as `gistkern.ops.library` says, intervals as mask.md does."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gist_k: torch.Tensor
    gist_v: torch.Tensor
    gist_begin: torch.Tensor
    gist_end: torch.Tensor
    local_begin: torch.Tensor
    scale: float

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, gist_k and gist_v."""
        return self[:5]

    @property
    def intervals(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gist_begin, gist_end and local_begin."""
        return self[5:8]

    def readable(self) -> AttentionArguments:
        """The same values as kernels read them: D contiguous in the buffers, and the intervals altogether."""
        q, k, v, gist_k, gist_v = map(dense_rows, self[:5])
        gist_begin, gist_end, local_begin = (vector.contiguous() for vector in self[5:8])
        return AttentionArguments(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, self.scale)


class DecodeArguments(NamedTuple):
    """The arguments of one step of decoding over a pool and a paged tail: shapes as `gistkern.ops.decode` says.

    The vectors are ``[B, N]`` here, and `gist_capacity` and `scale` are given.
    """

    q: torch.Tensor
    gist_k: torch.Tensor
    gist_v: torch.Tensor
    gist_k_scale: torch.Tensor | None
    gist_v_scale: torch.Tensor | None
    gist_begin: torch.Tensor
    gist_end: torch.Tensor
    tail_k: torch.Tensor
    tail_v: torch.Tensor
    tail_k_scale: torch.Tensor | None
    tail_v_scale: torch.Tensor | None
    tail_length: torch.Tensor | None
    local_begin: torch.Tensor | None
    page_table: torch.Tensor | None
    gist_capacity: int
    scale: float

    @property
    def gist(self) -> KeyValueRows:
        """The pool; checked on the way."""
        return KeyValueRows(*self[1:5])

    @property
    def tail(self) -> KeyValueRows:
        """The tail, or its pages; checked on the way."""
        return KeyValueRows(*self[7:11])


class PoolWrite(NamedTuple):
    """Gist rows of a layer and the pool they are written to: shapes as `gistkern.ops.decode.gist_compact` says."""

    k: torch.Tensor
    v: torch.Tensor
    gather: torch.Tensor
    slot: torch.Tensor
    pool_k: torch.Tensor
    pool_v: torch.Tensor
    pool_k_scale: torch.Tensor | None
    pool_v_scale: torch.Tensor | None

    @property
    def pool(self) -> KeyValueRows:
        """The pool; checked on the way."""
        return KeyValueRows(*self[4:])


class Meta(NamedTuple):
    """The compile-time constants of an attention kernel, one argument of a launch: `META`.

    `HEADS` query heads of `D` elements, `GROUP` of them to a K/V head and `PACK` to a tile of `BM` rows by `BN`
    columns, `BD` elements wide; `PRECISION` as `matmul` takes it. `WIDE`: row offsets do not fit int32. `BLEND`,
    `TWO_LOOPS`: see `load_columns` and `attend`. `GIST`: the columns of dk and dv are the compact rows.
    """

    HEADS: int
    GROUP: int
    PACK: int
    D: int
    BD: int
    BM: int
    BN: int
    PRECISION: str
    WIDE: bool
    BLEND: bool = False
    TWO_LOOPS: bool = False
    GIST: bool = False


def strided(*buffers: torch.Tensor) -> tuple[tuple[torch.Tensor, tuple[int, ...]], ...]:
    """``[B, H, R, D]`` buffers as kernels take them: of each the pointer, and the strides of batch, head and row."""
    return tuple([(buffer, buffer.stride()[:3]) for buffer in buffers])


def row_tiles(kernel: str, arguments: AttentionArguments, precision: str) -> tuple[Config, Meta, tuple[int, ...]]:
    """How a kernel with a program for each tile of query rows is launched: its config, its constants, its counts.

    The counts are rows, local rows, packs of heads, tiles and heads in a section (`scheduled`): there are tiles times
    packs programs.
    """
    batch, heads, rows, dim = arguments.q.shape
    kv_heads, local_rows = arguments.k.shape[1:3]
    itemsize, facts, width = arguments.q.element_size(), facts_of(arguments.q.device), padded(dim)
    config = pick(kernel, facts.arch, width, itemsize, dim)
    group, block = heads // kv_heads, config.block_rows
    pack = pack_heads(group, block)
    tiles, packs = ceil(rows / (block // pack)), batch * heads // pack
    head_bytes = 2 * (local_rows + arguments.gist_k.shape[2]) * dim * itemsize
    wide, cols = wide_rows(*arguments.buffers[1:]), config.block_cols
    meta = Meta(heads, group, pack, dim, width, block, cols, precision, wide, facts.amd, config.two_loops)
    return config, meta, (rows, local_rows, packs, tiles, section_heads(packs, head_bytes, facts.l2_bytes))
