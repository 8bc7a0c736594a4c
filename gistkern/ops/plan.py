"""What the calls of one layout do on tensors of one kind, worked out once for all layers and kept on the layout.

A layer's call compares one tuple (`key_of`) with that of the plan. All that `gist_attention` refuses is refused when a
plan is made, so that tensors with the same tuple need no more questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from gistkern import backends
from gistkern.backends import plain
from gistkern.kernels.arguments import AttentionArguments
from gistkern.layout import GistLayout
from gistkern.layout.checks import is_checked, state_of
from gistkern.ops import checks, library
from gistkern.ops.function import added, apply, of_compact_rows
from gistkern.ops.room import Room, compact_behind
from gistkern.ops.sinks import with_learned_sinks

__all__ = ["Found", "Plan", "keep", "kept", "key_of", "plan_for", "plan_of_next"]

# plans that a layout keeps: for layers of several kinds, with and without gradients
_MOST = 16
Found = tuple[torch.Tensor, Any, Any, Any]


class Plan:
    """By a backend's functions, one after the other.

    Attributes
    ----------
    backend : str
        A name of `gistkern.backends.BACKENDS`.
    scale : float
        Of the scores.
    gradient : bool
        Whether something is differentiable.
    gathers : bool
        Whether calls bring new compact rows; otherwise attention reads the past ones.
    past : int
        How many past rows there are.
    vectors : tuple of Tensor
        gist_begin, gist_end, local_begin and gather of the layout, contiguous.
    copied : bool
        Whether one of them is a copy of the layout's, which does not see what is written to that.
    """

    key: tuple[Any, ...]
    asked: tuple[Any, ...] = ()  # of its key, what `key_of` takes beside tensors and layout
    # as `attend`, of the layout and what is asked too: None unless the plan turns out to be one for all of these
    attend_again: Callable[..., Found | None] | None = None
    follows = False  # whether it serves the layout of the next decode step too, behind a tail that is longer

    def __init__(self, backend: str, scale: float, gradient: bool, layout: GistLayout, has_past: bool) -> None:
        self.backend, self.scale, self.gradient = backend, scale, gradient
        self.module: ModuleType = backends.get(backend).load()
        self.gathers = layout.gather.shape[1] > 0 or not has_past
        self.past = layout.past
        vectors = begin, end, local, gather = layout.gist_begin, layout.gist_end, layout.local_begin, layout.gather
        mine = begin.contiguous(), end.contiguous(), local.contiguous(), gather.contiguous()
        self.vectors: tuple[torch.Tensor, ...] = mine
        self._given, self._versions = vectors, versions_of(*vectors)
        self.copied = not (mine[0] is begin and mine[1] is end and mine[2] is local and mine[3] is gather)

    def attend(self, q, k, v, past_k, past_v, learned_sinks, whole: bool, room: Room | None) -> Found:
        """Output, LSE, and the compact rows that attention has read: the past ones themselves where none are new.

        Unless `whole`, all but the output may be None. New rows are written to `room`, if there is one.
        """
        if not self.gradient:
            out, lse, gist_k, gist_v = self.forward(q, k, v, past_k, past_v, room)
            if learned_sinks is not None:
                out, lse = with_learned_sinks(out, lse, learned_sinks)
            return out, lse, gist_k, gist_v
        found = apply(self, whole, True, q, k, v, past_k, past_v, learned_sinks)
        if not whole:
            return found, None, None, None
        return found if self.gathers else (*found, past_k, past_v)

    def _is_of(self, layout: GistLayout) -> bool:
        """Whether it is sure that these are the layout's vectors, as they were."""
        # asked at every layer: attributes only, and no loop
        begin, end, local, gather = self._given
        if not (layout.gist_begin is begin and layout.gist_end is end and layout.local_begin is local):
            return False
        if self.copied or layout.gather is not gather:
            return False
        try:
            return (begin._version, end._version, local._version, gather._version) == self._versions
        except RuntimeError:  # as `versions_of`
            return self._versions is None

    def again(self, whole: bool, q, k, v, past_k, past_v, room: Room | None = None) -> Sequence[Any] | None:
        """See `gistkern.ops.function.Plan`."""
        return None

    def may_be_stale(self) -> bool:
        """Whether copies may belie the layout's vectors: nobody counts writes to inference tensors or to a graph's."""
        if not self.copied:
            return False
        return self._versions is None or (self.vectors[0].is_cuda and torch.cuda.is_current_stream_capturing())

    def check_unchanged(self) -> None:
        """See `gistkern.ops.function.Plan`."""
        if versions_of(*self._given) != self._versions:
            raise RuntimeError("the layout was modified by an inplace operation between a forward and its backward")

    def forward(
        self, q, k, v, past_k, past_v, room: Room | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `gistkern.ops.function.Plan`."""
        *rule, gather = self.vectors
        if room is not None:
            rows = compact_behind(self.module, k, v, gather, room, self.past)
        elif self.gathers:
            rows = checks.call(self.module, "compact", checks.check_compact, k, v, past_k, past_v, gather)
        else:
            rows = past_k, past_v
        arguments = AttentionArguments(q, k, v, *rows, *rule, self.scale)
        return *checks.call(self.module, "forward", checks.check_attention, arguments), *rows

    def backward(self, grad_out, q, k, v, gist_k, gist_v, out, lse) -> tuple[torch.Tensor | None, ...]:
        """See `gistkern.ops.function.Plan`."""
        *rule, gather = self.vectors
        past, saved = gist_k.shape[2] - gather.shape[1], (grad_out, out, lse)
        arguments = AttentionArguments(q, k, v, gist_k, gist_v, *rule, self.scale)
        if hasattr(self.module, "folded_backward"):
            check = checks.check_folded_backward
            folded = checks.call(self.module, "folded_backward", check, arguments, gather, *saved)
            return folded if past else (*folded[:3], None, None)
        dq, dk, dv, *dgist = checks.call(self.module, "backward", checks.check_backward, arguments, *saved)
        more_k, more_v, *past_rows = of_compact_rows(self, k, gist_k, *dgist)
        return dq, added(dk, more_k), added(dv, more_v), *past_rows


def _with(learned_sinks: torch.Tensor | None, out, lse, gist_k, gist_v) -> Found:
    if learned_sinks is not None:
        out, lse = with_learned_sinks(out, lse, learned_sinks)
    return out, lse, gist_k, gist_v


class _OfTriton(Plan):
    """By launches that are prepared once, and look at their tensors themselves."""

    def __init__(self, tensors: tuple[Any, ...], in_room: bool, *rest: Any) -> None:
        super().__init__(*rest)
        launches = self.module.TritonPlan(*tensors, self.vectors, self.scale, in_room)
        self.forward, self.backward = launches.forward, launches.backward  # type: ignore[method-assign]
        self.again = launches.again  # type: ignore[method-assign]

    def attend(self, q, k, v, past_k, past_v, learned_sinks, whole: bool, room: Room | None) -> Found:
        """See `Plan.attend`."""
        if self.gradient:
            return super().attend(q, k, v, past_k, past_v, learned_sinks, whole, room)
        more = whole or learned_sinks is not None
        return _with(learned_sinks, *self.forward(q, k, v, past_k, past_v, room, more))  # type: ignore[call-arg]

    def attend_again(
        self, q, k, v, past_k, past_v, learned_sinks, layout: GistLayout, asked: tuple[Any, ...], whole: bool, room
    ) -> Found | None:
        """See `Plan.attend_again`."""
        if asked != self.asked or (past_k is None) != (past_v is None) or not self._is_of(layout):
            return None
        try:
            if not self.gradient:
                found = self.again(whole or learned_sinks is not None, q, k, v, past_k, past_v, room)
                if found is None or learned_sinks is None:
                    return found  # type: ignore[return-value]
                return _with(learned_sinks, *found)
            found = apply(self, whole, False, q, k, v, past_k, past_v, learned_sinks)
        except NotImplementedError:  # of sparse, nested and meta tensors: refused by name where a plan is made
            return None
        if found is None or not whole:
            return None if found is None else (found, None, None, None)
        return found if self.gathers else (*found, past_k, past_v)


class _Prepared(Plan):
    """By one function for tensors that lie alike (`prepared_forward` of a backend)."""

    def __init__(self, tensors: tuple[Any, ...], *rest: Any) -> None:
        super().__init__(*rest)
        self.prepared = self.module.prepared_forward(*tensors, self.vectors, self.scale)

    def forward(
        self, q, k, v, past_k, past_v, room: Room | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `gistkern.ops.function.Plan`."""
        if self.prepared is None:
            return super().forward(q, k, v, past_k, past_v, room)
        try:
            return self.prepared(q, k, v, past_k, past_v, room)
        except Exception:
            super().forward(q, k, v, past_k, past_v, room)  # says by name what is wrong
            raise


class _OfTorch(Plan):
    """By torch's own causal attention, which sees no compact row: new ones are gathered beside it."""

    def __init__(self, compacts: str, *rest: Any) -> None:
        super().__init__(*rest)
        self.compacts = compacts

    def attend(self, q, k, v, past_k, past_v, learned_sinks, whole: bool, room: Room | None) -> Found:
        """See `Plan.attend`. No LSE."""
        rows = past_k, past_v
        if room is not None:
            rows = compact_behind(backends.get(self.compacts).load(), k, v, self.vectors[3], room, self.past)
        elif self.gathers and whole:
            rows = library.compact(k, v, past_k, past_v, self.vectors[3], self.compacts)
        return plain.attend(q, k, v, self.scale), None, *rows


class _OfDecode(Plan):
    """By a function that decodes over any number of local rows (`prepared_decode` of a backend)."""

    follows = True

    def __init__(self, decode: Callable[..., tuple[torch.Tensor, torch.Tensor]], q: torch.Tensor, *rest: Any) -> None:
        super().__init__(*rest)
        self.decode, self.of_q = decode, q.shape

    def attend_again(
        self, q, k, v, past_k, past_v, learned_sinks, layout: GistLayout, asked: tuple[Any, ...], whole: bool, room
    ) -> Found | None:
        """See `Plan.attend_again`. The kernel looks at all but how many rows the layout says that there are."""
        if asked != self.asked or past_k is None or past_v is None or learned_sinks is not None:
            return None
        try:
            local, past = k.shape[2], past_k.shape[2]
            if q.shape != self.of_q or local != layout.tail + self.of_q[2] or past != self.past:
                return None
            if not self._is_of(layout):
                return None
            out, lse = self.decode(q, k, v, past_k, past_v)
        except (IndexError, RuntimeError):  # for it there are other plans, or words by name
            return None
        return out, lse, past_k, past_v

    def attend(self, q, k, v, past_k, past_v, learned_sinks, whole: bool, room: Room | None) -> Found:
        """See `Plan.attend`. There are no new rows."""
        try:
            out, lse = self.decode(q, k, v, past_k, past_v)
        except Exception:
            checks.check_attention(AttentionArguments(q, k, v, past_k, past_v, *self.vectors[:3], self.scale))
            raise
        if learned_sinks is not None:
            out, lse = with_learned_sinks(out, lse, learned_sinks)
        return out, lse, past_k, past_v


def versions_of(begin, end, local, gather) -> tuple[int, ...] | None:
    """How often each was written to; None where inference tensors are among them, of which nobody counts that."""
    try:
        return begin._version, end._version, local._version, gather._version
    except RuntimeError:
        return None


def key_of(q, k, v, past_k, past_v, layout: GistLayout, asked: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that a plan depends on: of the tensors, the layout's vectors, and what is `asked` beside.

    Local rows are counted from the end of the layout's tail: a plan that knows no more (`Plan.follows`) serves the next
    decode step too. Raises AttributeError, ValueError or RuntimeError for what are no dense tensors.
    """
    state, tail = state_of(layout), layout.tail
    past: Any = past_k is None and past_v is None  # one without the other is refused
    if past_k is not None and past_v is not None:
        past = (
            *(past_k.shape, past_k.stride(), past_k.dtype, past_k.device),
            *(past_v.shape, past_v.stride(), past_v.dtype, past_v.device),
        )
    batch, heads, rows, dim = k.shape
    v_batch, v_heads, v_rows, v_dim = v.shape
    local = batch, heads, rows - tail, dim, v_batch, v_heads, v_rows - tail, v_dim
    negative = None
    if not q.is_cpu:  # whose operators see it themselves
        given = (q, k, v) if past_k is None or past_v is None else (q, k, v, past_k, past_v)
        negative = tuple([tensor.is_neg() for tensor in given])
    return (
        *(q.shape, q.stride(), q.dtype, q.device, local, k.stride(), k.dtype, k.device, v.stride(), v.dtype, v.device),
        *(past, negative, state and (state[0], state[2:]), asked),
    )


def kept(layout: GistLayout, key: tuple[Any, ...], last: Plan | None) -> Plan | None:
    """The plan of a layout for calls of this key, if there is one and the layout's tensors are as they were.

    `last` is the one that was asked for last.
    """
    if last is not None and last.key == key and not (last.copied and last.may_be_stale()):
        return last
    plan: Plan | None = layout.__dict__.get("_plans", {}).get(key)
    if plan is None or plan.may_be_stale():
        return None
    layout.__dict__["_plan"] = plan
    return plan


def keep(layout: GistLayout, key: tuple[Any, ...], plan: Plan) -> None:
    """Keep a plan on the layout, unless its values could not be read to check them, or are copies that go stale."""
    plan.key, plan.asked = key, key[-1]
    if not is_checked(layout) or plan.may_be_stale():
        return
    plans = layout.__dict__.setdefault("_plans", {})
    if len(plans) >= _MOST:
        plans.clear()
    plans[key] = layout.__dict__["_plan"] = plan


def plan_of_next(layout: GistLayout, before: GistLayout) -> None:
    """Keep for a layout what serves it of the plans of `before`, whose vectors it has, behind a tail that is longer."""
    last: Plan | None = before.__dict__.get("_plan")
    if last is not None and last.follows:
        layout.__dict__["_plan"] = last


def plan_for(
    backend: str,
    tensors: tuple[Any, ...],
    layout: GistLayout,
    scale: float,
    gradient: bool,
    *,
    lse: bool,
    sinks: bool,
    in_room: bool,
) -> Plan:
    """The plan for checked tensors q, k, v, past_k and past_v, with room for new rows or without.

    Raises as `gistkern.backends.choose`.
    """
    q, has_past = tensors[0], tensors[3] is not None
    name = backends.choose(backend, q, gradient, plain=layout.plain, lse=lse, sinks=sinks)
    rest = name, scale, gradient, layout, has_past
    if name == "torch":
        return _OfTorch(backends.choose("auto", q, gradient), *rest)
    if name == "triton":
        return _OfTriton(tensors, in_room, *rest)
    if layout.gather.shape[1] and hasattr(backends.get(name).load(), "prepared_forward"):
        return _Prepared(tensors, *rest)
    plan = Plan(*rest)
    prepare = getattr(plan.module, "prepared_decode", None)
    if prepare is not None and not gradient and not plan.gathers:
        decode = prepare(AttentionArguments(*tensors, *plan.vectors[:3], scale))
        if decode is not None:
            return _OfDecode(decode, q, *rest)
    return plan
