"""Backward of gist-masked attention on Hopper, key side: dk and dv of a tile of columns over the rows that see it.

Three partitions to a program, as in bwd_dq.py: a warp that copies, and two warpgroups that multiply, 64 columns each,
over one stream of query rows with their gradients and statistics. Either skips the steps that none of its own columns
needs. Compact columns are cut into row chunks with fp32 partial sums, which the fold adds up in order: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gistkern.kernels.hopper.ring import barriers, following
from gistkern.kernels.primitives import FAR, LOG2E, scheduled

__all__ = ["DkvMeta", "sm90_gist_attn_bwd_dkv_kernel"]


class DkvMeta(NamedTuple):
    """The compile-time constants: as `Meta` of kernels/arguments.py, and the stages of query rows."""

    HEADS: int
    GROUP: int
    PACK: int
    D: int
    STAGES: int
    GIST: bool


@gluon.jit
def unit_of(i_item, table_ptr, order, META: gl.constexpr):
    """What an item visits: sample, K/V head, chunk, first column, its numbers' address, first row and steps of rows."""
    n_tiles, n_heads, section, n_chunks, table_at, n_table = order
    i_unit, i_bh = scheduled(i_item, n_tiles * n_chunks, n_heads, section, LAST_FIRST=False)
    i_tile = i_unit // n_chunks
    i_chunk = i_unit % n_chunks
    KV_HEADS: gl.constexpr = META.HEADS // META.GROUP
    POSITIONS: gl.constexpr = 64 // META.PACK
    PACKS: gl.constexpr = META.GROUP // META.PACK
    i_b = i_bh // KV_HEADS
    p_work = table_ptr + (i_b * n_table + table_at + i_tile) * 16
    row_begin = gl.load(p_work)
    row_end = gl.load(p_work + 1)
    per_chunk = gl.cdiv(gl.cdiv(row_end - row_begin, POSITIONS), n_chunks) * POSITIONS
    row_begin += i_chunk * per_chunk
    row_end = gl.minimum(row_end, row_begin + per_chunk)
    n_steps = gl.maximum(gl.cdiv(row_end - row_begin, POSITIONS), 0) * PACKS
    return i_b, i_bh % KV_HEADS, i_chunk * n_heads + i_bh, i_tile * 128, p_work, row_begin, n_steps


@gluon.jit
def copy_rows(maps, tiles, rings, bars, table_ptr, order, META: gl.constexpr):
    """The copying partition: keys and values of a tile of columns, then as stages of the ring the rows that see it."""
    q_map, do_map, stats_map, k_map, v_map = maps
    k_smem, v_smem = tiles
    q_ring, do_ring, lse_ring, delta_ring = rings
    kv_full, kv_empty, full, empty = bars
    POSITIONS: gl.constexpr = 64 // META.PACK
    PACKS: gl.constexpr = META.GROUP // META.PACK
    ALL_PACKS: gl.constexpr = META.HEADS // META.PACK
    LANES: gl.constexpr = (1, POSITIONS, META.PACK, META.D)
    COLUMNS: gl.constexpr = (1, 1, 64, META.D)
    BYTES: gl.constexpr = 2 * 64 * META.D * 2
    STATS: gl.constexpr = (1, 1, 64)
    STAGES: gl.constexpr = META.STAGES
    i_stage = 0
    i_phase = 0
    i_turn = 0
    for i_item in range(gl.program_id(0), order[0] * order[1] * order[3], gl.num_programs(0)):
        i_b, i_kv, _, i_first, _, row_begin, n_steps = unit_of(i_item, table_ptr, order, META)
        for w in gl.static_range(2):
            mbarrier.wait(kv_empty.index(w), i_turn ^ 1)
            mbarrier.expect(kv_full.index(w), BYTES)
            at = [i_b, i_kv, i_first + w * 64, 0]
            tma.async_copy_global_to_shared(k_map, at, kv_full.index(w), k_smem.index(w).reshape(COLUMNS))
            tma.async_copy_global_to_shared(v_map, at, kv_full.index(w), v_smem.index(w).reshape(COLUMNS))
        i_turn ^= 1
        for i_step in range(0, n_steps):
            i_row = row_begin + i_step // PACKS * POSITIONS
            i_pack = i_kv * PACKS + i_step % PACKS
            bar = full.index(i_stage)
            mbarrier.wait(empty.index(i_stage), i_phase ^ 1)
            mbarrier.expect(bar, BYTES + 2 * 64 * 4)
            lanes = [i_b, i_row, i_pack * META.PACK, 0]
            tma.async_copy_global_to_shared(q_map, lanes, bar, q_ring.index(i_stage).reshape(LANES))
            tma.async_copy_global_to_shared(do_map, lanes, bar, do_ring.index(i_stage).reshape(LANES))
            pack = i_b * ALL_PACKS + i_pack
            lane = i_row * META.PACK
            tma.async_copy_global_to_shared(stats_map, [0, pack, lane], bar, lse_ring.index(i_stage).reshape(STATS))
            tma.async_copy_global_to_shared(stats_map, [1, pack, lane], bar, delta_ring.index(i_stage).reshape(STATS))
            i_stage, i_phase = following(i_stage, i_phase, STAGES)


@gluon.jit
def multiply(results, tiles, rings, bars, rule, sizes, table_ptr, scale, order, W: gl.constexpr, META: gl.constexpr):
    """Multiplying partition `W`: dk and dv of its 64 columns of every tile. sizes: rows, columns, past columns."""
    k_smem, v_smem = tiles
    q_ring, do_ring, lse_ring, delta_ring = rings
    kv_full, kv_empty, full, empty = bars
    n_rows, n_cols, n_past = sizes
    D: gl.constexpr = META.D
    POSITIONS: gl.constexpr = 64 // META.PACK
    PACKS: gl.constexpr = META.GROUP // META.PACK
    LS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LP: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LO, k_width=2)
    LM: gl.constexpr = gl.SliceLayout(0, LS)
    dtype: gl.constexpr = k_smem.dtype
    o_n = gl.arange(0, 64, gl.SliceLayout(1, LS))
    o_m = gl.arange(0, 64, LM)
    none = gl.zeros([64, 64], gl.float32, LS)
    b_k = k_smem.index(W)
    b_v = v_smem.index(W)
    STAGES: gl.constexpr = META.STAGES
    i_stage = 0
    i_phase = 0
    i_turn = 0
    for i_item in range(gl.program_id(0), order[0] * order[1] * order[3], gl.num_programs(0)):
        i_b, i_kv, i_out, i_first, p_work, row_begin, n_steps = unit_of(i_item, table_ptr, order, META)
        begin = gl.load(p_work + 2 + 4 * W)
        end = gl.load(p_work + 3 + 4 * W)
        full_begin = gl.load(p_work + 4 + 4 * W)
        full_end = gl.load(p_work + 5 + 4 * W)
        begin_ptr = rule[0] + i_b.to(gl.int64) * n_rows
        end_ptr = rule[1] + i_b.to(gl.int64) * n_rows
        i_col = i_first + W * 64
        b_dk = gl.zeros([64, D], gl.float32, LO)
        b_dv = gl.zeros([64, D], gl.float32, LO)
        mbarrier.wait(kv_full.index(W), i_turn)
        for i_step in range(0, n_steps):
            i_row = row_begin + i_step // PACKS * POSITIONS
            mbarrier.wait(full.index(i_stage), i_phase)
            if (i_row < end) & (i_row + POSITIONS > begin):
                b_q = q_ring.index(i_stage)
                b_do = do_ring.index(i_stage)
                s_token = warpgroup_mma(b_k, b_q.permute((1, 0)), none, use_acc=False, is_async=True)
                dp_token = warpgroup_mma(b_v, b_do.permute((1, 0)), none, use_acc=False, is_async=True)
                b_lse = lse_ring.index(i_stage).load(LM)
                b_s = warpgroup_mma_wait(1, deps=(s_token,))  # [columns, rows]
                b_p = gl.exp2(b_s * (scale * LOG2E) - b_lse[None, :])
                if (i_row < full_begin) | (i_row + POSITIONS > full_end):
                    o_row = i_row + o_m // META.PACK
                    b_begin = gl.load(begin_ptr + o_row, mask=o_row < n_rows, other=FAR)
                    if META.GIST:
                        b_end = gl.load(end_ptr + o_row, mask=o_row < n_rows, other=0)
                    else:
                        b_end = o_row + n_past + 1
                    o_col = (i_col + o_n)[:, None]
                    b_p = gl.where((b_begin[None, :] <= o_col) & (o_col < b_end[None, :]), b_p, 0.0)
                dv_token = warpgroup_mma(gl.convert_layout(b_p.to(dtype), LP), b_do, b_dv, is_async=True)
                b_dp = warpgroup_mma_wait(1, deps=(dp_token,))
                b_delta = delta_ring.index(i_stage).load(LM)
                b_ds = b_p * (b_dp - b_delta[None, :])
                dk_token = warpgroup_mma(gl.convert_layout(b_ds.to(dtype), LP), b_q, b_dk, is_async=True)
                b_dv, b_dk = warpgroup_mma_wait(0, deps=(dv_token, dk_token))
            mbarrier.arrive(empty.index(i_stage), count=1)
            i_stage, i_phase = following(i_stage, i_phase, STAGES)
        b_dk *= scale
        if META.GIST:
            # fp32 partial sums: a row of 64 columns is wider than the keys' place
            o_out = i_col + gl.arange(0, 64, gl.SliceLayout(1, LO))
            o_d = gl.arange(0, D, gl.SliceLayout(0, LO))
            p_out = ((i_out.to(gl.int64) * n_cols + o_out) * D)[:, None] + o_d[None, :]
            m_out = (o_out < n_cols)[:, None]
            gl.store(results[0] + p_out, b_dk.to(results[0].dtype.element_ty), mask=m_out)
            gl.store(results[1] + p_out, b_dv.to(results[1].dtype.element_ty), mask=m_out)
        else:
            b_k.store(b_dk.to(dtype))
            b_v.store(b_dv.to(dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(results[0], [i_b, i_kv, i_col, 0], b_k.reshape((1, 1, 64, D)))
            tma.async_copy_shared_to_global(results[1], [i_b, i_kv, i_col, 0], b_v.reshape((1, 1, 64, D)))
            tma.store_wait(0)
        mbarrier.arrive(kv_empty.index(W), count=1)
        i_turn ^= 1


_SIZES = ["n_rows", "n_cols", "n_past", "n_tiles", "n_heads", "section", "n_chunks", "table_at", "n_table"]


@gluon.jit(do_not_specialize=_SIZES)
def sm90_gist_attn_bwd_dkv_kernel(
    q_map, grad_out_map, stats_map, k_map, v_map, dk, dv, rule, table_ptr,
    scale, n_rows, n_cols, n_past, n_tiles, n_heads, section, n_chunks, table_at, n_table, META: gl.constexpr,
):  # fmt: skip
    """dk and dv of local columns (tensor maps like k's), or of compact ones (GIST) as partial sums of row chunks.

    Those are fp32 ``[n_chunks, B, HEADS / GROUP, n_cols, D]``, contiguous. Maps of q and grad_out are
    ``[B, N, HEADS, D]`` in boxes of 64 lanes, of k and v ``[B, HEADS / GROUP, n_cols, D]`` in boxes of 64 columns, of
    the statistics (LSE, delta) of `sm90_gist_attn_bwd_dq_kernel` ``[2, packs, lanes]``. rule: as of
    `gist_attn_bwd_dkv_kernel`; table: of `sm90_gist_attn_bwd_work_kernel`, n_table tiles a sample, these from table_at
    on. n_heads = B * HEADS / GROUP.
    """
    table_ptr = table_ptr.to(gl.pointer_type(gl.int32), bitcast=True)  # a part of a workspace
    D: gl.constexpr = META.D
    STAGES: gl.constexpr = META.STAGES
    dtype: gl.constexpr = q_map.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    k_smem = gl.allocate_shared_memory(dtype, [2, 64, D], LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [2, 64, D], LAYOUT)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 64, D], LAYOUT)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 64, D], LAYOUT)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 64], PLAIN)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 64], PLAIN)
    kv_full = barriers(2, 1)
    kv_empty = barriers(2, 1)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    fence_async_shared()
    maps = q_map, grad_out_map, stats_map, k_map, v_map
    tiles, rings, bars = (k_smem, v_smem), (q_ring, do_ring, lse_ring, delta_ring), (kv_full, kv_empty, full, empty)
    sizes = n_rows, n_cols, n_past
    order = n_tiles, n_heads, section, n_chunks, table_at, n_table
    results = dk, dv
    gl.warp_specialize(
        [
            (multiply, (results, tiles, rings, bars, rule, sizes, table_ptr, scale, order, 0, META)),
            (multiply, (results, tiles, rings, bars, rule, sizes, table_ptr, scale, order, 1, META)),
            (copy_rows, (maps, tiles, rings, bars, table_ptr, order, META)),
        ],
        [4, 1],
        [240, 24],
    )
