"""What ttsem does not model of Gluon's kernels: copies, products and stores that land later, and what orders them.

ttsem executes an asynchronous operation where it stands, and its partitions one at a time, so a missing wait goes
unseen. Here every partition has a vector clock, as race detectors have (Flanagan and Freund 2009, "FastTrack"): an
arrival hands it to a barrier's phase, a wait takes that of the phase. Every access to shared memory must then come
after what it depends on, by such a chain, in whatever order the partitions happened to run:

- a TMA copy writes at a time of its own, which only a wait for its barrier puts in the past of a reader;
- a product reads its tiles until it is waited for, and what it returns is NaN until then;
- a TMA store reads its tile until it is waited for;
- what a partition wrote itself is seen by products and stores only after a fence.

Shared memory is NaN where nothing was written, and not to be read there. `dropped` leaves out one such operation of
the kernel's code, and `plants` lists all that can be left out: a test plants each mistake once.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import defaultdict

import numpy as np
import torch
from ttsem import harness, mlir
from ttsem import ops as semantics
from ttsem.interp import Scheduler
from vector_clocks import AsynchronyError, State

__all__ = ["AsynchronyError", "dropped", "plants"]

HOPPER = 90
# operations without results, which a mutation deletes; the others of `KINDS` wait for all but so many
DELETED = ("ttng.wait_barrier", "ttng.arrive_barrier", "ttng.barrier_expect", "ttng.fence_async_shared")
KINDS = (*DELETED, "ttng.warp_group_dot_wait", "ttng.async_tma_store_wait")
_MANY = 99

_dropped: tuple[str, int] | None = None
_last = ""


def _state(interp) -> State:
    if not hasattr(interp, "asynchrony") or interp.asynchrony[0] != interp.program_id:
        interp.asynchrony = interp.program_id, State()
    return interp.asynchrony[1]


def _agent(interp):
    """The partition that runs: 0 is the default one, and the program before and after it."""
    return interp.scheduler._me() if interp.scheduler is not None else 0


def _place(data):
    return np.lib.array_utils.byte_bounds(data)


def _fill(data):
    if data.dtype.kind == "f":
        data[...] = np.nan
    elif data.dtype == np.uint16:
        data[...] = 0x7FC0  # bfloat16, which numpy does not have


def _join(one, other):
    for agent, time in other.items():
        one[agent] = max(one.get(agent, 0), time)


def _phases(barrier):
    """What is in the past of each phase of a barrier, by its number, and who has arrived."""
    if not hasattr(barrier, "phases"):
        barrier.phases, barrier.arrived = defaultdict(dict), set()
    return barrier.phases


def _hand(state, agent, barrier):
    """`agent` arrives: what it has done until now is in the past of who waits for the phase."""
    clock, phases = state.clock(agent), _phases(barrier)
    arrival, before = (agent, barrier.completed), phases[barrier.completed - 1]
    if arrival in barrier.arrived or any(clock.get(other, 0) < time for other, time in before.items()):
        raise AsynchronyError(f"partition {agent} has not waited for the phase before the one that it arrives for")
    barrier.arrived.add(arrival)
    _join(phases[barrier.completed], clock)
    clock[agent] = clock.get(agent, 0) + 1


def _wrapped(name):
    """Replace what ttsem does for an operation by a function that is given it too."""

    def replace(function):
        before = semantics.OPS[name]

        @functools.wraps(function)
        def handler(interp, op, args):
            return function(before, interp, op, args)

        semantics.OPS[name] = handler
        return function

    return replace


def _on(args):
    """Whether the predicate, an operation's last operand, lets it happen."""
    return not args or bool(np.asarray(args[-1]))


def install():
    """Teach ttsem; once in a process."""
    code_of, shared_of = harness.ir_for_launch, harness.shared_memory
    known = {}

    def ir_for_launch(record, stage, target, *args, **kwargs):
        global _last
        if not getattr(record.fn, "is_gluon", bool)():
            return code_of(record, stage, target, *args, **kwargs)
        hopper = harness.target_for("cpu", HOPPER)
        options, *rest = harness._specialize(record.fn, record.args, record.kwargs, hopper)
        key = record.fn, *map(repr, rest), options.num_warps
        if key not in known:
            mlir.enable_generic_printing()
            known[key] = mlir.to_generic(harness._stage_text(record, "ttgir", hopper), None)
        _last = known[key]
        return _without(_last, _dropped)

    def shared_memory(record, target):
        # compiled for Hopper to the end by bench/compiled alone, which takes its time
        return 0 if getattr(record.fn, "is_gluon", bool)() else shared_of(record, target)

    execute_code = harness.execute

    def execute(record, *args, **kwargs):
        execution = execute_code(record, *args, **kwargs)
        for leaf, value in harness._leaf_bound(record).items():
            if harness._is_descriptor(value) and execution.memory is not None:  # ttsem returns none of these
                raw = np.ascontiguousarray(execution.buffer(record, leaf)).view(np.uint8).reshape(-1)
                flat = torch.empty(0, dtype=torch.uint8, device=value.base.device)
                flat.set_(value.base.untyped_storage())
                flat[: raw.size].copy_(torch.from_numpy(raw.copy()))
        return execution

    block_until = Scheduler.block_until

    def block_or_tell(self, ready, what):
        try:
            block_until(self, ready, what)
        except Exception as deadlock:  # of the default partition, where another one has failed: that is the reason
            raise self.error or deadlock from None

    Scheduler.block_until = block_or_tell
    harness.ir_for_launch, harness.shared_memory, harness.execute = ir_for_launch, shared_memory, execute
    _teach_memory()
    _teach_barriers()
    _teach_products()
    _teach_partitions()


def _without(code, planted):
    """The code less an operation, or with one that waits for nothing."""
    if planted is None:
        return code
    kind, number = planted
    seen, lines = 0, []
    for line in code.splitlines():
        if f'"{kind}"(' in line:
            if seen == number and kind in DELETED:
                seen += 1
                continue
            if seen == number:
                line = re.sub(r"pendings = \d+", f"pendings = {_MANY}", line)
            seen += 1
        lines.append(line)
    assert seen > number, f"the kernel has no {kind} number {number}"
    return "\n".join(lines)


def plants():
    """Each ``(kind, number)`` that `dropped` can leave out of the Gluon kernel launched last."""
    return [(kind, number) for kind in KINDS for number in range(_last.count(f'"{kind}"('))]


@contextlib.contextmanager
def dropped(kind, number):
    """Gluon kernels run within the block without their operation `number` of this kind."""
    global _dropped
    _dropped = kind, number
    try:
        yield
    finally:
        _dropped = None


def _teach_memory():
    @_wrapped("ttg.local_alloc")
    def local_alloc(before, interp, op, args):
        (made,) = before(interp, op, args)
        state, place = _state(interp), _place(made.data)
        state.forget(*place)
        if args:
            agent = _agent(interp)
            state.write(agent, place, agent, state.clock(agent)[agent])
            state.unfenced[agent].append(place)
        else:
            _fill(made.data)
        return [made]

    @_wrapped("ttg.local_load")
    def local_load(before, interp, op, args):
        _state(interp).read(_agent(interp), _place(args[0].data), proxy=False)
        return before(interp, op, args)

    @_wrapped("ttg.local_store")
    def local_store(before, interp, op, args):
        state, agent, place = _state(interp), _agent(interp), _place(args[1].data)
        state.write(agent, place, agent, state.clock(agent)[agent])
        state.unfenced[agent].append(place)
        return before(interp, op, args)

    @_wrapped("ttng.fence_async_shared")
    def fence(before, interp, op, args):
        _state(interp).unfenced[_agent(interp)].clear()
        return before(interp, op, args)

    @_wrapped("ttng.async_tma_copy_global_to_local")
    def copy_in(before, interp, op, args):
        _, _, _, alloc, dest, pred = semantics._segments(op, args, 6)
        if _on(pred):
            state, barrier = _state(interp), semantics._barrier(interp, op, alloc)
            state.check_fence(_place(alloc[0].data))
            copies = f"copies of barrier {semantics._barrier_key(alloc[0])}"
            place, when = _place(dest[0].data), barrier.completed + 1
            state.write(_agent(interp), place, copies, when)
            _join(_phases(barrier)[barrier.completed], {copies: when})
        return before(interp, op, args)

    @_wrapped("ttng.async_tma_copy_local_to_global")
    def copy_out(before, interp, op, args):
        state, agent, place = _state(interp), _agent(interp), _place(args[-1].data)
        state.stores[agent].append(state.read_until_told(agent, place, "store"))
        return before(interp, op, args)

    @_wrapped("ttng.async_tma_store_wait")
    def store_wait(before, interp, op, args):
        state, agent = _state(interp), _agent(interp)
        waiting, pendings = state.stores[agent], int(op.attrs["pendings"])
        for place, reader in waiting[: len(waiting) - pendings] if pendings else waiting:
            state.read_is_over(agent, place, reader)
        state.stores[agent] = waiting[-pendings:] if pendings else []
        return before(interp, op, args)


def _teach_barriers():
    @_wrapped("ttng.init_barrier")
    def init(before, interp, op, args):
        _state(interp).unfenced[_agent(interp)].append(_place(args[0].data))
        return before(interp, op, args)

    @_wrapped("ttng.arrive_barrier")
    def arrive(before, interp, op, args):
        if _on(args[1:]):
            _hand(_state(interp), _agent(interp), semantics._barrier(interp, op, args))
        return before(interp, op, args)

    @_wrapped("ttng.barrier_expect")
    def expect(before, interp, op, args):
        if _on(args[1:]):
            _hand(_state(interp), _agent(interp), semantics._barrier(interp, op, args))
        return before(interp, op, args)

    @_wrapped("ttng.wait_barrier")
    def wait(before, interp, op, args):
        result = before(interp, op, args)
        alloc, _, pred, _ = semantics._segments(op, args, 4)
        if _on(pred):
            state, barrier = _state(interp), semantics._barrier(interp, op, alloc)
            phases = _phases(barrier)
            for number in range(barrier.completed):  # all phases up to the one that has let it pass
                _join(state.clock(_agent(interp)), phases[number])
        return result


def _teach_products():
    # the value of what has not been waited for, by the NaN that stands for it
    @_wrapped("ttng.warp_group_dot")
    def product(before, interp, op, args):
        state, agent = _state(interp), _agent(interp)
        late = {id(nan): value for nan, value, _ in state.products[agent]}
        # products run in order, so one may add to what another has not finished
        known = [*args[:2], late.get(id(args[2]), args[2]), *args[3:]]
        places = [_place(a.data) for a in args[:2] if hasattr(a, "data") and not isinstance(a, np.ndarray)]
        reads = [state.read_until_told(agent, place, "product") for place in places]
        (value,) = before(interp, op, known)
        if not op.attrs.get("isAsync", False):
            for place, reader in reads:
                state.read_is_over(agent, place, reader)
            return [value]
        nan = np.full_like(value, np.nan)
        state.products[agent].append((nan, value, reads))
        return [nan]

    @_wrapped("ttng.warp_group_dot_wait")
    def product_wait(before, interp, op, args):
        state, agent = _state(interp), _agent(interp)
        waiting, pendings = state.products[agent], int(op.attrs["pendings"])
        done = waiting[: max(len(waiting) - pendings, 0)]
        state.products[agent] = waiting[len(done) :]
        for _, _, reads in done:
            for place, reader in reads:
                state.read_is_over(agent, place, reader)
        values = {id(nan): value for nan, value, _ in done}
        return [values.get(id(a), a) for a in args[: len(op.result_types)]]


def _teach_partitions():
    @_wrapped("ttg.warp_specialize")
    def specialize(before, interp, op, args):
        state = _state(interp)
        fork = dict(state.clock(0))
        members = sum(len(inner.regions) for r in op.regions[1:] for b in r.blocks for inner in b.ops)
        for agent in range(1, members + 1):
            state.clocks[agent] = fork | {agent: 1}
        state.clocks[0][0] += 1
        results = before(interp, op, args)
        for agent in range(members + 1):
            if state.products[agent] or state.stores[agent]:
                raise AsynchronyError(f"partition {agent} ends before its products or stores have")
            _join(state.clocks[0], state.clocks[agent])
        return results


install()
