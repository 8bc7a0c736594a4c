"""Rings of shared memory between a partition that fills and partitions that use: stages, phases, barriers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

__all__ = ["barriers", "following"]


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers ``[COUNT, 1]``, each of whose phases ends with so many arrivals.

    A fence has to follow before copies arrive at them.
    """
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def following(i_stage, i_phase, STAGES: gl.constexpr):
    """The stage after `i_stage`, and the parity of its phase: the other one each time round.

    Both begin at 0. Who uses waits for `i_phase` of a full barrier, who fills for ``i_phase ^ 1`` of an empty one,
    which a fresh barrier lets pass.
    """
    is_last = i_stage == STAGES - 1
    return gl.where(is_last, 0, i_stage + 1), i_phase ^ is_last.to(gl.int32)
