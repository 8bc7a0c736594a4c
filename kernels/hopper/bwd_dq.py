"""Backward of gist-masked attention on Hopper, query side: dq, and of each row the LSE and delta that dk and dv need.

Three partitions to a program: a warp that copies (TMA), and two warpgroups that multiply (wgmma), 64 lanes of query
rows each, over one stream of keys and values. Programs stay and walk tiles, so the next tile's copies are under way
while the last one is written. docs/internals/hopper.md has the picture.
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
from gistkern.kernels.primitives import LOG2E, scheduled

__all__ = ["DqMeta", "sm90_gist_attn_bwd_dq_kernel"]


class DqMeta(NamedTuple):
    """The compile-time constants: as `Meta` of kernels/arguments.py, and the stages of keys and values."""

    HEADS: int
    GROUP: int
    PACK: int
    D: int
    STAGES: int


@gluon.jit
def tile_of(i_item, order, META: gl.constexpr):
    """(sample, tile, first position, first query head, pack) of an item.

    order: as `scheduled` takes it, then tiles of a sample in the table.
    """
    i_tile, i_bh = scheduled(i_item, order[0], order[1], order[2], LAST_FIRST=True)
    PACKS: gl.constexpr = META.HEADS // META.PACK
    return i_bh // PACKS, i_tile, i_tile * (128 // META.PACK), i_bh % PACKS * META.PACK, i_bh


@gluon.jit
def copy_tiles(maps, tiles, rings, bars, table_ptr, order, META: gl.constexpr):
    """The copying partition: q and grad_out of a tile, then as stages of the ring its out, its keys and its values."""
    q_map, do_map, out_map, k_map, v_map, gk_map, gv_map = maps
    q_smem, do_smem = tiles
    k_ring, v_ring = rings
    q_full, q_empty, full, empty = bars
    POSITIONS: gl.constexpr = 64 // META.PACK
    LANES: gl.constexpr = (1, POSITIONS, META.PACK, META.D)
    STAGE: gl.constexpr = (1, 1, 64, META.D)
    BYTES: gl.constexpr = 2 * 64 * META.D * 2
    STAGES: gl.constexpr = META.STAGES
    i_stage = 0
    i_phase = 0
    i_slot = 0
    i_turn = 0
    for i_item in range(gl.program_id(0), order[0] * order[1], gl.num_programs(0)):
        i_b, i_tile, i_row, i_head, _ = tile_of(i_item, order, META)
        for w in gl.static_range(2):
            at = [i_b, i_row + w * POSITIONS, i_head, 0]
            i_half = 2 * i_slot + w
            mbarrier.wait(q_empty.index(i_half), i_turn ^ 1)
            mbarrier.expect(q_full.index(i_half), BYTES)
            tma.async_copy_global_to_shared(q_map, at, q_full.index(i_half), q_smem.index(i_half).reshape(LANES))
            tma.async_copy_global_to_shared(do_map, at, q_full.index(i_half), do_smem.index(i_half).reshape(LANES))
        i_slot, i_turn = following(i_slot, i_turn, 2)
        mbarrier.wait(empty.index(i_stage), i_phase ^ 1)
        mbarrier.expect(full.index(i_stage), BYTES)
        bar = full.index(i_stage)
        tma.async_copy_global_to_shared(out_map, [i_b, i_row, i_head, 0], bar, k_ring.index(i_stage).reshape(LANES))
        at = [i_b, i_row + POSITIONS, i_head, 0]
        tma.async_copy_global_to_shared(out_map, at, bar, v_ring.index(i_stage).reshape(LANES))
        i_stage, i_phase = following(i_stage, i_phase, STAGES)
        p_work = table_ptr + (i_b * order[3] + i_tile) * 16
        gist_lo = gl.load(p_work)
        n_gist = gl.load(p_work + 1)
        local_lo = gl.load(p_work + 3)
        n_cols = gl.load(p_work + 4)
        i_kv = i_head // META.GROUP
        for i_col in range(0, n_cols, 64):
            bar = full.index(i_stage)
            mbarrier.wait(empty.index(i_stage), i_phase ^ 1)
            mbarrier.expect(bar, BYTES)
            for i_box in gl.static_range(4):
                o_col = i_col + i_box * 16
                b_k = k_ring.index(i_stage).reshape(STAGE).slice(i_box * 16, 16, 2)
                b_v = v_ring.index(i_stage).reshape(STAGE).slice(i_box * 16, 16, 2)
                if o_col < n_gist:
                    tma.async_copy_global_to_shared(gk_map, [i_b, i_kv, gist_lo + o_col, 0], bar, b_k)
                    tma.async_copy_global_to_shared(gv_map, [i_b, i_kv, gist_lo + o_col, 0], bar, b_v)
                else:
                    o_row = local_lo + o_col - n_gist
                    tma.async_copy_global_to_shared(k_map, [i_b, i_kv, o_row, 0], bar, b_k)
                    tma.async_copy_global_to_shared(v_map, [i_b, i_kv, o_row, 0], bar, b_v)
            i_stage, i_phase = following(i_stage, i_phase, STAGES)


@gluon.jit
def multiply(dq_map, tiles, rings, bars, rows, table_ptr, scale, order, W: gl.constexpr, META: gl.constexpr):
    """Multiplying partition `W`: dq of its 64 lanes of every tile. rows: lse, stats, rule, n_rows, n_past, n_stats."""
    q_smem, do_smem = tiles
    k_ring, v_ring = rings
    q_full, q_empty, full, empty = bars
    lse_ptr, stats_ptr, rule, n_rows, n_past, n_stats = rows
    D: gl.constexpr = META.D
    POSITIONS: gl.constexpr = 64 // META.PACK
    LS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LP: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LO, k_width=2)
    LR: gl.constexpr = gl.SliceLayout(1, LS)
    dtype: gl.constexpr = q_smem.dtype
    o_m = gl.arange(0, 64, LR)
    o_n = gl.arange(0, 64, gl.SliceLayout(0, LS))
    none = gl.zeros([64, 64], gl.float32, LS)
    STAGES: gl.constexpr = META.STAGES
    i_stage = 0
    i_phase = 0
    i_slot = 0
    i_turn = 0
    for i_item in range(gl.program_id(0), order[0] * order[1], gl.num_programs(0)):
        i_b, i_tile, i_row, i_head, i_pack = tile_of(i_item, order, META)
        i_row += W * POSITIONS
        o_row = i_row + o_m // META.PACK
        m_row = o_row < n_rows
        p_stat = (i_b.to(gl.int64) * META.HEADS + i_head + o_m % META.PACK) * n_rows + o_row
        b_lse = gl.load(lse_ptr + p_stat, mask=m_row, other=float("-inf"))
        # a row that sees nothing: every probability exactly 0
        b_lse = gl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
        p_work = table_ptr + (i_b * order[3] + i_tile) * 16
        gist_lo = gl.load(p_work)
        n_gist = gl.load(p_work + 1)
        full_gist = gl.load(p_work + 2)
        local_lo = gl.load(p_work + 3)
        n_cols = gl.load(p_work + 4)
        full_local = gl.load(p_work + 5)
        p_rule = i_b.to(gl.int64) * n_rows + o_row
        b_gist = gl.load(rule[0] + p_rule, mask=m_row, other=0) - gist_lo
        b_gist_end = gl.load(rule[1] + p_rule, mask=m_row, other=0) - gist_lo
        b_local = gl.load(rule[2] + p_rule, mask=m_row, other=0) + (n_gist - local_lo)
        b_last = o_row + (n_past + n_gist - local_lo)

        i_half = 2 * i_slot + W
        b_q = q_smem.index(i_half)
        b_do = do_smem.index(i_half)
        mbarrier.wait(q_full.index(i_half), i_turn)
        mbarrier.wait(full.index(i_stage), i_phase)
        if W == 0:
            b_out = k_ring.index(i_stage).load(LO)
        else:
            b_out = v_ring.index(i_stage).load(LO)
        b_delta = gl.sum(b_out.to(gl.float32) * b_do.load(LO).to(gl.float32), 1)
        b_delta = gl.convert_layout(b_delta, LR)
        mbarrier.arrive(empty.index(i_stage), count=1)
        i_stage, i_phase = following(i_stage, i_phase, STAGES)
        p_lane = stats_ptr + i_pack.to(gl.int64) * n_stats + i_row * META.PACK + o_m
        gl.store(p_lane, b_lse, mask=m_row)
        gl.store(p_lane + order[1].to(gl.int64) * n_stats, b_delta, mask=m_row)

        b_dq = gl.zeros([64, D], gl.float32, LO)
        for i_col in range(0, n_cols, 64):
            b_k = k_ring.index(i_stage)
            mbarrier.wait(full.index(i_stage), i_phase)
            s_token = warpgroup_mma(b_q, b_k.permute((1, 0)), none, use_acc=False, is_async=True)
            dp_token = warpgroup_mma(b_do, v_ring.index(i_stage).permute((1, 0)), none, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=(s_token,))
            b_p = gl.exp2(b_s * (scale * LOG2E) - b_lse[:, None])
            in_gist = i_col + 64 <= full_gist
            in_local = (i_col >= n_gist) & (i_col + 64 <= full_local)
            if not (in_gist | in_local):
                o_col = (i_col + o_n)[None, :]
                m_gist = (o_col >= b_gist[:, None]) & (o_col < b_gist_end[:, None])
                m_local = (o_col >= b_local[:, None]) & (o_col <= b_last[:, None])
                b_p = gl.where(m_gist | m_local, b_p, 0.0)
            b_dp = warpgroup_mma_wait(0, deps=(dp_token,))
            b_ds = b_p * (b_dp - b_delta[:, None])
            dq_token = warpgroup_mma(gl.convert_layout(b_ds.to(dtype), LP), b_k, b_dq, is_async=True)
            b_dq = warpgroup_mma_wait(0, deps=(dq_token,))
            mbarrier.arrive(empty.index(i_stage), count=1)
            i_stage, i_phase = following(i_stage, i_phase, STAGES)
        b_q.store((b_dq * scale).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_map, [i_b, i_row, i_head, 0], b_q.reshape((1, POSITIONS, META.PACK, D)))
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(i_half), count=1)
        i_slot, i_turn = following(i_slot, i_turn, 2)


@gluon.jit(do_not_specialize=["n_rows", "n_past", "n_stats", "n_tiles", "n_heads", "section", "n_table"])
def sm90_gist_attn_bwd_dq_kernel(
    q_map, grad_out_map, out_map, k_map, v_map, gist_k_map, gist_v_map, dq_map, lse_ptr, stats_ptr, rule, table_ptr,
    scale, n_rows, n_past, n_stats, n_tiles, n_heads, section, n_table, META: gl.constexpr,
):  # fmt: skip
    """dq ``[B, HEADS, N, D]``, and of each lane the LSE in units of log2 and delta.

    Tensor maps of q, grad_out, out and dq are ``[B, N, HEADS, D]`` in boxes of 64 lanes, of k, v, gist_k and gist_v
    ``[B, HEADS / GROUP, rows, D]`` in boxes of 16 rows (Triton takes none within a tuple); stats: fp32
    ``[2, n_heads, n_stats]``, the lanes of a pack of heads position by position. n_heads = B * HEADS / PACK; rule: as
    of `gist_attn_fwd_kernel`; table: of `sm90_gist_attn_bwd_work_kernel`, n_table tiles a sample.
    """
    table_ptr = table_ptr.to(gl.pointer_type(gl.int32), bitcast=True)  # a part of a workspace
    D: gl.constexpr = META.D
    STAGES: gl.constexpr = META.STAGES
    maps = q_map, grad_out_map, out_map, k_map, v_map, gist_k_map, gist_v_map
    dtype: gl.constexpr = q_map.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [4, 64, D], LAYOUT)
    do_smem = gl.allocate_shared_memory(dtype, [4, 64, D], LAYOUT)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 64, D], LAYOUT)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 64, D], LAYOUT)
    q_full = barriers(4, 1)
    q_empty = barriers(4, 1)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    fence_async_shared()
    tiles, rings, bars = (q_smem, do_smem), (k_ring, v_ring), (q_full, q_empty, full, empty)
    rows = lse_ptr, stats_ptr, rule, n_rows, n_past, n_stats
    order = n_tiles, n_heads, section, n_table
    gl.warp_specialize(
        [
            (multiply, (dq_map, tiles, rings, bars, rows, table_ptr, scale, order, 0, META)),
            (multiply, (dq_map, tiles, rings, bars, rows, table_ptr, scale, order, 1, META)),
            (copy_tiles, (maps, tiles, rings, bars, table_ptr, order, META)),
        ],
        [4, 1],
        [240, 24],
    )
