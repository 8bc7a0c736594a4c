"""Forward of gist-masked attention on Hopper: copies, products and softmax by warps of their own.

Three partitions to a program: a warp that copies (TMA), and two warpgroups that multiply (wgmma), 64 lanes of query
rows each, over one stream of keys and values: gist columns, then local ones. Either hands back the tiles that none of
its rows sees, and cuts its last one to 32 columns. Programs stay and walk tiles of rows, longest first, so the next
one's copies are under way while the last one is written. docs/internals/hopper.md has the picture.
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
from gistkern.kernels.primitives import LN2, LOG2E, scheduled

__all__ = ["HALF", "WARPS", "FwdMeta", "sm90_gist_attn_fwd_kernel"]

# lanes of query rows that one warpgroup owns: the height of a `wgmma`
HALF = 64
# of the partition that a launch counts: a warpgroup
WARPS = 4


class FwdMeta(NamedTuple):
    """The compile-time constants: as `Meta` of kernels/arguments.py, and the stages of keys and of values."""

    HEADS: int
    GROUP: int
    PACK: int
    D: int
    BN: int
    STAGES: int


@gluon.jit
def tile_of(i_item, order, work_ptr, META: gl.constexpr):
    """Sample, first position and first query head of an item, and the address of its numbers; order: `scheduled`'s."""
    n_tiles, n_heads, section = order
    i_tile, i_bh = scheduled(i_item, n_tiles, n_heads, section, LAST_FIRST=True)
    PACKS: gl.constexpr = META.HEADS // META.PACK
    i_b = i_bh // PACKS
    p_work = work_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + (i_b * n_tiles + i_tile) * 24
    return i_b, i_tile * (128 // META.PACK), i_bh % PACKS * META.PACK, p_work


@gluon.jit
def copy_columns(maps, at, columns, bar, b_stage, META: gl.constexpr):
    """BN rows from a column on into a stage, in boxes of 16: each of the gist buffer or of the local one."""
    gist_map, local_map = maps
    i_b, i_kv, i_col = at
    gist_lo, n_gist, local_lo = columns
    b_rows = b_stage.reshape((1, 1, META.BN, META.D))
    for i_box in gl.static_range(META.BN // 16):
        o_col = i_col + i_box * 16
        b_box = b_rows.slice(i_box * 16, 16, 2)
        if o_col < n_gist:
            tma.async_copy_global_to_shared(gist_map, [i_b, i_kv, gist_lo + o_col, 0], bar, b_box)
        else:
            tma.async_copy_global_to_shared(local_map, [i_b, i_kv, local_lo + o_col - n_gist, 0], bar, b_box)


@gluon.jit
def copy_tiles(maps, q_smem, rings, bars, work_ptr, order, META: gl.constexpr):
    """The copying partition: queries of a tile, then its keys and values, stage by stage."""
    q_map, k_map, v_map, gist_k_map, gist_v_map = maps
    k_ring, v_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    POSITIONS: gl.constexpr = 64 // META.PACK
    LANES: gl.constexpr = (1, POSITIONS, META.PACK, META.D)
    BYTES: gl.constexpr = META.BN * META.D * 2
    i_stage = 0
    i_phase = 0
    i_turn = 0
    for i_item in range(gl.program_id(0), order[0] * order[1], gl.num_programs(0)):
        i_b, i_row, i_head, p_work = tile_of(i_item, order, work_ptr, META)
        columns = gl.load(p_work), gl.load(p_work + 1), gl.load(p_work + 2)
        n_cols = gl.load(p_work + 3)
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), i_turn ^ 1)
            mbarrier.expect(q_full.index(w), 64 * META.D * 2)
            lanes = [i_b, i_row + w * POSITIONS, i_head, 0]
            tma.async_copy_global_to_shared(q_map, lanes, q_full.index(w), q_smem.index(w).reshape(LANES))
        i_turn ^= 1
        i_kv = i_head // META.GROUP
        for i_col in range(0, n_cols, META.BN):
            at = i_b, i_kv, i_col
            mbarrier.wait(k_empty.index(i_stage), i_phase ^ 1)
            mbarrier.expect(k_full.index(i_stage), BYTES)
            copy_columns((gist_k_map, k_map), at, columns, k_full.index(i_stage), k_ring.index(i_stage), META)
            mbarrier.wait(v_empty.index(i_stage), i_phase ^ 1)
            mbarrier.expect(v_full.index(i_stage), BYTES)
            copy_columns((gist_v_map, v_map), at, columns, v_full.index(i_stage), v_ring.index(i_stage), META)
            i_stage, i_phase = following(i_stage, i_phase, META.STAGES)


@gluon.jit
def masked(b_s, i_col, sees, full, W: gl.constexpr, LS: gl.constexpr, META: gl.constexpr):
    """Scores of columns ``[i_col, i_col + W)``, -inf where the rule hides them; untouched where every row sees all.

    sees: the rule at the half's sample, its first and the last row, and what turns rows of a buffer into columns. The
    intervals are read where they are needed, at the boundary: they would cost the loop inside registers.
    """
    gist_begin, gist_end, local_begin, local_end = full
    in_gist = (i_col >= gist_begin) & (i_col + W <= gist_end)
    in_local = (i_col >= local_begin) & (i_col + W <= local_end)
    if not (in_gist | in_local):
        begin_ptr, end_ptr, local_ptr, i_row, n_rows, gist_shift, local_shift, last_shift = sees
        o_col = (i_col + gl.arange(0, W, gl.SliceLayout(0, LS)))[None, :]
        o_row = i_row + gl.arange(0, 64, gl.SliceLayout(1, LS)) // META.PACK
        m_row = o_row < n_rows
        b_begin = gl.load(begin_ptr + o_row, mask=m_row, other=0) + gist_shift
        b_end = gl.load(end_ptr + o_row, mask=m_row, other=0) + gist_shift
        b_local = gl.load(local_ptr + o_row, mask=m_row, other=0) + local_shift
        m_gist = (o_col >= b_begin[:, None]) & (o_col < b_end[:, None])
        m_local = (o_col >= b_local[:, None]) & (o_col <= (o_row + last_shift)[:, None])
        b_s = gl.where(m_gist | m_local, b_s, float("-inf"))
    return b_s


@gluon.jit
def softmax(b_s, b_m, b_l, qk_scale, LS: gl.constexpr, LR: gl.constexpr):
    """`softmax_step` of kernels/primitives.py, for layouts of wgmma: probabilities, factor, new maximum and sum."""
    b_new = gl.maximum(b_m, gl.convert_layout(gl.max(b_s, 1), LR))
    # a row that has seen nothing yet has -inf here, and -inf - -inf would be NaN
    b_safe = gl.where(b_new == float("-inf"), 0.0, b_new) * qk_scale
    b_p = gl.exp2(b_s * qk_scale - gl.convert_layout(b_safe, gl.SliceLayout(1, LS))[:, None])
    b_alpha = gl.exp2(b_m * qk_scale - b_safe)
    return b_p, b_alpha, b_new, b_l * b_alpha + gl.convert_layout(gl.sum(b_p, 1), LR)


@gluon.jit
def attend_some(
    b_q, b_k, b_v, state, i_col, sees, full, qk_scale, FIRST: gl.constexpr, W: gl.constexpr, META: gl.constexpr
):
    """Attention over columns ``[FIRST, FIRST + W)`` of the tile that begins at `i_col`; nothing is left under way."""
    b_acc, b_m, b_l = state
    LO: gl.constexpr = b_acc.type.layout
    LS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, W, 16])
    LP: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LO, k_width=2)
    none = gl.zeros([64, W], gl.float32, LS)
    token = warpgroup_mma(b_q, b_k.slice(FIRST, W, 0).permute((1, 0)), none, use_acc=False, is_async=True)
    b_s = masked(warpgroup_mma_wait(0, deps=(token,)), i_col + FIRST, sees, full, W, LS, META)
    b_p, b_alpha, b_m, b_l = softmax(b_s, b_m, b_l, qk_scale, LS, gl.SliceLayout(1, LO))
    b_p = gl.convert_layout(b_p.to(b_q.dtype), LP)
    token = warpgroup_mma(b_p, b_v.slice(FIRST, W, 0), b_acc * b_alpha[:, None], is_async=True)
    return warpgroup_mma_wait(0, deps=(token,)), b_m, b_l


@gluon.jit
def hand_back(bars, turn, i_begin, i_end, META: gl.constexpr):
    """Hand back tiles of columns that no row of this half sees, once they are filled. Returns the turn after them."""
    k_full, k_empty, v_full, v_empty = bars
    i_stage, i_phase = turn
    for _ in range(i_begin, i_end):
        mbarrier.wait(k_full.index(i_stage), i_phase)
        mbarrier.arrive(k_empty.index(i_stage), count=1)
        mbarrier.wait(v_full.index(i_stage), i_phase)
        mbarrier.arrive(v_empty.index(i_stage), count=1)
        i_stage, i_phase = following(i_stage, i_phase, META.STAGES)
    return i_stage, i_phase


@gluon.jit
def attend(b_q, rings, bars, turn, state, i_begin, last_col, sees, full, qk_scale, META: gl.constexpr):
    """Attention from tile `i_begin` to column `last_col`: a tile's softmax runs under the products of the next.

    turn: stage and phase of tile `i_begin`. Returns the state (`softmax`, and the output before) and the turn after.
    """
    k_ring, v_ring = rings
    k_full, k_empty, v_full, v_empty = bars
    i_stage, i_phase = turn
    b_acc, b_m, b_l = state
    BN: gl.constexpr = META.BN
    LO: gl.constexpr = b_acc.type.layout
    LS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    LP: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LO, k_width=2)
    LR: gl.constexpr = gl.SliceLayout(1, LO)
    none = gl.zeros([64, BN], gl.float32, LS)
    dtype: gl.constexpr = b_q.dtype
    # in whole tiles up to where fewer than BN - 31 columns remain
    i_whole = gl.maximum((last_col + 31) // BN, i_begin)
    if i_begin < i_whole:
        mbarrier.wait(k_full.index(i_stage), i_phase)
        token = warpgroup_mma(b_q, k_ring.index(i_stage).permute((1, 0)), none, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(token,))
        mbarrier.arrive(k_empty.index(i_stage), count=1)
        b_s = masked(b_s, i_begin * BN, sees, full, BN, LS, META)
        b_p, b_alpha, b_m, b_l = softmax(b_s, b_m, b_l, qk_scale, LS, LR)
        b_acc = b_acc * b_alpha[:, None]
        b_p = gl.convert_layout(b_p.to(dtype), LP)
        for i in range(i_begin + 1, i_whole):
            i_before = i_stage
            before_phase = i_phase
            i_stage, i_phase = following(i_stage, i_phase, META.STAGES)
            mbarrier.wait(k_full.index(i_stage), i_phase)
            s_token = warpgroup_mma(b_q, k_ring.index(i_stage).permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(i_before), before_phase)
            o_token = warpgroup_mma(b_p, v_ring.index(i_before), b_acc, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=(s_token,))
            mbarrier.arrive(k_empty.index(i_stage), count=1)
            b_s = masked(b_s, i * BN, sees, full, BN, LS, META)
            b_next, b_alpha, b_m, b_l = softmax(b_s, b_m, b_l, qk_scale, LS, LR)
            b_acc = warpgroup_mma_wait(0, deps=(o_token,))
            mbarrier.arrive(v_empty.index(i_before), count=1)
            b_acc = b_acc * b_alpha[:, None]
            b_p = gl.convert_layout(b_next.to(dtype), LP)
        mbarrier.wait(v_full.index(i_stage), i_phase)
        o_token = warpgroup_mma(b_p, v_ring.index(i_stage), b_acc, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=(o_token,))
        mbarrier.arrive(v_empty.index(i_stage), count=1)
        i_stage, i_phase = following(i_stage, i_phase, META.STAGES)
    i_col = i_whole * BN
    n_rest = last_col - i_col
    if n_rest > 0:
        mbarrier.wait(k_full.index(i_stage), i_phase)
        mbarrier.wait(v_full.index(i_stage), i_phase)
        b_k = k_ring.index(i_stage)
        b_v = v_ring.index(i_stage)
        state = b_acc, b_m, b_l
        WIDE: gl.constexpr = BN > 64
        if WIDE & (n_rest > 32):
            if WIDE:
                state = attend_some(b_q, b_k, b_v, state, i_col, sees, full, qk_scale, 0, 64, META)
                if n_rest > 64:
                    state = attend_some(b_q, b_k, b_v, state, i_col, sees, full, qk_scale, 64, 32, META)
        else:
            state = attend_some(b_q, b_k, b_v, state, i_col, sees, full, qk_scale, 0, 32, META)
        b_acc, b_m, b_l = state
        mbarrier.arrive(k_empty.index(i_stage), count=1)
        mbarrier.arrive(v_empty.index(i_stage), count=1)
        i_stage, i_phase = following(i_stage, i_phase, META.STAGES)
    return (b_acc, b_m, b_l), (i_stage, i_phase)


@gluon.jit
def multiply(out_map, q_smem, rings, bars, rows, work_ptr, scale, order, HALF: gl.constexpr, META: gl.constexpr):
    """A multiplying partition: output and LSE of half the lanes of every tile. rows: lse, rule, n_rows, n_past."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    of_ring = k_full, k_empty, v_full, v_empty
    lse_ptr, rule, n_rows, n_past = rows
    D: gl.constexpr = META.D
    POSITIONS: gl.constexpr = 64 // META.PACK
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LR: gl.constexpr = gl.SliceLayout(1, LO)
    o_m = gl.arange(0, 64, LR)
    b_q = q_smem.index(HALF)
    qk_scale = scale * LOG2E
    turn = 0, 0
    i_turn = 0
    for i_item in range(gl.program_id(0), order[0] * order[1], gl.num_programs(0)):
        i_b, i_row, i_head, p_work = tile_of(i_item, order, work_ptr, META)
        i_row += HALF * POSITIONS
        gist_lo = gl.load(p_work)
        shift = gl.load(p_work + 1) - gl.load(p_work + 2)
        n_tiles = gl.cdiv(gl.load(p_work + 3), META.BN)
        p_half = p_work + 8 + HALF * 8
        full = gl.load(p_half + 4), gl.load(p_half + 5), gl.load(p_half + 6), gl.load(p_half + 7)
        o_rule = i_b.to(gl.int64) * n_rows
        begin_ptr, end_ptr, local_ptr = rule[0] + o_rule, rule[1] + o_rule, rule[2] + o_rule
        sees = begin_ptr, end_ptr, local_ptr, i_row, n_rows, -gist_lo, shift, n_past + shift

        mbarrier.wait(q_full.index(HALF), i_turn)
        b_acc = gl.zeros([64, D], gl.float32, LO)
        b_m = gl.full([64], float("-inf"), gl.float32, LR)
        b_l = gl.zeros([64], gl.float32, LR)
        state = b_acc, b_m, b_l
        i_seen = 0
        for i_walk in range(2):
            i_begin = gl.load(p_half + 2 * i_walk)
            last_col = gl.load(p_half + 2 * i_walk + 1)
            if last_col > 0:
                turn = hand_back(of_ring, turn, i_seen, i_begin, META)
                state, turn = attend(b_q, rings, of_ring, turn, state, i_begin, last_col, sees, full, qk_scale, META)
                i_seen = gl.cdiv(last_col, META.BN)
        turn = hand_back(of_ring, turn, i_seen, n_tiles, META)
        b_acc, b_m, b_l = state

        o_row = i_row + o_m // META.PACK
        m_row = o_row < n_rows
        b_begin = gl.load(begin_ptr + o_row, mask=m_row, other=0)
        b_end = gl.load(end_ptr + o_row, mask=m_row, other=0)
        # tiles without a mask give rows that see nothing garbage
        m_empty = (b_begin >= b_end) & (gl.load(local_ptr + o_row, mask=m_row, other=0) > o_row + n_past)
        m_empty = m_empty | (b_l == 0.0)
        b_out = gl.where(m_empty[:, None], 0.0, b_acc / gl.where(m_empty, 1.0, b_l)[:, None])
        b_lse = gl.where(m_empty, float("-inf"), b_m * scale + gl.log2(gl.where(m_empty, 1.0, b_l)) * LN2)
        p_stat = (i_b.to(gl.int64) * META.HEADS + i_head + o_m % META.PACK) * n_rows + o_row
        gl.store(lse_ptr + p_stat, b_lse, mask=m_row)
        b_q.store(b_out.to(b_q.dtype))  # over the queries, which nothing reads any more
        fence_async_shared()
        tma.async_copy_shared_to_global(out_map, [i_b, i_row, i_head, 0], b_q.reshape((1, POSITIONS, META.PACK, D)))
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(HALF), count=1)
        i_turn ^= 1


@gluon.jit(do_not_specialize=["n_rows", "n_past", "n_tiles", "n_heads", "section"])
def sm90_gist_attn_fwd_kernel(
    q_map, k_map, v_map, gist_k_map, gist_v_map, out_map, lse_ptr, rule, work_ptr,
    scale, n_rows, n_past, n_tiles, n_heads, section, META: gl.constexpr,
):  # fmt: skip
    """out ``[B, HEADS, N, D]`` and natural-log LSE ``[B, HEADS, N]``.

    Tensor maps of q and out are ``[B, N, HEADS, D]`` in boxes of 64 lanes, of k, v, gist_k and gist_v
    ``[B, HEADS / GROUP, rows, D]`` in boxes of 16 rows (Triton takes none within a tuple). n_past = local rows before
    the first query row; n_heads = B * HEADS / PACK. work: of `sm90_gist_attn_fwd_work_kernel`.
    """
    maps = q_map, k_map, v_map, gist_k_map, gist_v_map
    dtype: gl.constexpr = q_map.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [2, 64, META.D], LAYOUT)
    k_ring = gl.allocate_shared_memory(dtype, [META.STAGES, META.BN, META.D], LAYOUT)
    v_ring = gl.allocate_shared_memory(dtype, [META.STAGES, META.BN, META.D], LAYOUT)
    q_full = barriers(2, 1)
    q_empty = barriers(2, 1)
    k_full = barriers(META.STAGES, 1)
    k_empty = barriers(META.STAGES, 2)
    v_full = barriers(META.STAGES, 1)
    v_empty = barriers(META.STAGES, 2)
    fence_async_shared()
    rings = k_ring, v_ring
    bars = q_full, q_empty, k_full, k_empty, v_full, v_empty
    rows = lse_ptr, rule, n_rows, n_past
    order = n_tiles, n_heads, section
    gl.warp_specialize(
        [
            (multiply, (out_map, q_smem, rings, bars, rows, work_ptr, scale, order, 0, META)),
            (multiply, (out_map, q_smem, rings, bars, rows, work_ptr, scale, order, 1, META)),
            (copy_tiles, (maps, q_smem, rings, bars, work_ptr, order, META)),
        ],
        [4, 1],
        [240, 24],
    )
