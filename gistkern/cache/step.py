"""The plan of a decode step from that of the step before: what stays the same is not computed again."""

from __future__ import annotations

from dataclasses import fields

import torch

from gistkern.cache.plan import CacheState, CallPlan, plan_raw
from gistkern.layout import GistLayout
from gistkern.layout.checks import still_trusted
from gistkern.ops.plan import plan_of_next

__all__ = ["Steps", "next_step"]

_FIELDS = tuple(field.name for field in fields(GistLayout))


class Steps:
    """What a cache is told of the calls to come, and keeps of the last one: steps of `generate` wait for no device."""

    def __init__(self) -> None:
        self.last: CallPlan | None = None  # of the call that made the state, if it brought raw tokens alone
        self._announced: torch.Tensor | None = None

    def announce(self, ids: torch.Tensor) -> None:
        """The call to come brings this very tensor ``[B, 1]``: a raw token for each sample, none of it padding."""
        self._announced = ids

    def plan(self, ids: torch.Tensor, state: CacheState | None) -> CallPlan | None:
        """Of the call that was announced; None for one of other ids, or behind a state that counting does not move."""
        announced, self._announced = self._announced, None
        if ids is not announced or state is None or ids.shape[0] != state.seen.shape[0]:
            return None
        return self.of_raw(1, state)

    def of_raw(self, rows: int, state: CacheState) -> CallPlan | None:
        """Of so many raw tokens for each sample; None behind a state that counting them does not move."""
        if state.tail_has_gists or state.moving:
            return None
        last = self.last
        if rows == 1 and last is not None and last.after is state and last.layout.gist_begin.shape[1] == 1:
            return next_step(last)
        return plan_raw(state, rows)


def next_step(last: CallPlan) -> CallPlan:
    """The plan of one more raw token for each sample, behind a call that brought one.

    What is seen of the gist rows, and where each sample's tail begins in its buffer, are as they were: the vectors of
    the layout are the same tensors, whose shapes and values were checked when they were made.
    """
    before, state = last.layout, last.after
    layout = object.__new__(GistLayout)
    known = before.__dict__
    layout.__dict__.update(zip(_FIELDS, map(known.__getitem__, _FIELDS), strict=True), tail=before.tail + 1)
    still_trusted(layout, before)
    plan_of_next(layout, before)
    columns = state.tail_columns + 1
    after = CacheState(
        state.seen + 1,
        state.gist_rows,
        state.tail_rows + 1,
        state.tail_position,
        state.tail_is_gist[:, :1].expand(-1, columns),  # none is
        state.gist_columns,
        columns,
        state.length + 1,
        state.fed + 1,
    )
    return CallPlan(layout, last.position_ids + 1, after, raw=True)
