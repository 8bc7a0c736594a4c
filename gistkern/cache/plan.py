"""What one model call sees of a cache and what the cache keeps of it, worked out once for all layers.

A cache layer holds gist rows and tail rows in two buffers, each right-aligned per sample. A call reads the compact
rows (the gist rows, and those that it gathers) and the local rows (the tail, and the N rows that it brings). `CallPlan`
says how the local rows are re-ordered for the call, and which of both stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from gistkern.layout import GistLayout
from gistkern.layout.checks import check_kept
from gistkern.layout.layout import layout_of
from gistkern.layout.schemes import decode_rows, from_roles

__all__ = ["CacheState", "CallPlan", "Kept", "plan_call", "plan_layout", "plan_raw"]

# of a buffer's columns: all, the same run for every sample, or int64 [B, columns] that list each sample's
Kept = slice | torch.Tensor | None


@dataclass(frozen=True)
class CacheState:
    """Per-sample bookkeeping of a `GistCache`; all tensors int64 ``[B]`` except `tail_is_gist`.

    `seen` counts the real tokens read so far, `gist_rows` and `tail_rows` the rows owned of the
    `gist_columns` and `tail_columns` stored, `tail_position` is the position of the tail's first token.
    `tail_is_gist` (bool ``[B, tail_columns]``) marks gists of a segment that is not ended yet.
    `length` is the logical length of the longest sample, in tokens; `fed` counts the columns (padding
    included) that calls brought since the context was compressed, which is how `generate` counts.
    """

    seen: torch.Tensor
    gist_rows: torch.Tensor
    tail_rows: torch.Tensor
    tail_position: torch.Tensor
    tail_is_gist: torch.Tensor
    gist_columns: int
    tail_columns: int
    length: int
    fed: int = 0
    tail_has_gists: bool = False
    moving: bool = False

    @classmethod
    def empty(cls, batch_size: int, device: torch.device | str) -> CacheState:
        """The state before the first call."""
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return cls(zeros, zeros, zeros, zeros, zeros.bool()[:, None][:, :0], 0, 0, 0)

    def owned_gists(self) -> torch.Tensor:
        """bool ``[B, gist_columns]``: which gist columns a sample owns."""
        column = torch.arange(self.gist_columns, device=self.seen.device)
        return column >= self.gist_columns - self.gist_rows[:, None]

    def on(self, device: torch.device | str) -> CacheState:
        """The same counts on a device."""
        moved: dict[str, Any] = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(self).items()}
        return CacheState(**moved)

    def select(self, index: torch.Tensor) -> CacheState:
        """The state of samples `index`, in that order (beams, batch selection)."""
        fields = ("seen", "gist_rows", "tail_rows", "tail_position", "tail_is_gist")
        return replace(self, **{name: getattr(self, name)[index.to(self.seen.device)] for name in fields})

    def crop(self, count: int) -> CacheState:
        """The state without the last `count` tokens, which must be raw tail tokens of every sample."""
        reach = min(int(self.tail_rows.min()), self.tail_columns)
        if count > reach or bool(self.tail_is_gist[:, self.tail_columns - count :].any()):
            raise ValueError(
                f"cannot crop {count} tokens: only the {reach} raw tokens after the compressed context "
                "can be taken back, the context itself is gone"
            )
        return replace(
            self,
            seen=self.seen - count,
            tail_rows=self.tail_rows - count,
            tail_is_gist=self.tail_is_gist[:, : self.tail_columns - count],
            tail_columns=self.tail_columns - count,
            length=self.length - count,
            fed=self.fed - count,
        )


@dataclass(frozen=True)
class CallPlan:
    """One call: `layout` for the attention, what the cache keeps of its rows, the state after the call.

    `arrange` (int64 ``[B, T + N]`` or None) re-orders the local rows before they are seen; `keep_gists` and `keep_tail`
    say which compact rows and which local rows, of those, stay. `real` (bool ``[B, N]``) are the tokens that are no
    padding, None where all are: a re-ordered call's layout has rows of the tail in the places of padding. `raw` marks
    a call that brings raw tokens for every sample, behind none but raw ones: all its rows stay. `context` marks a
    call of `gistkern.compress`, of whose context a digest is kept and not the ids; `capacity` are the compact rows that
    its calls write one behind the other, 0 where this one is alone.
    """

    layout: GistLayout
    position_ids: torch.Tensor
    after: CacheState
    arrange: torch.Tensor | None = None
    keep_gists: Kept = None
    keep_tail: Kept = None
    real: torch.Tensor | None = None
    raw: bool = False
    context: bool = False
    capacity: int = 0

    def on(self, device: torch.device) -> CallPlan:
        """The same plan with its tensors on a device."""
        if self.layout.device == device:
            return self
        moved: dict[str, Any] = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(self).items()}
        return CallPlan(**moved | {"layout": self.layout.to(device), "after": self.after.on(device)})


def plan_call(
    state: CacheState,
    is_gist: torch.Tensor,
    valid: torch.Tensor | None,
    *,
    scheme: str,
    sink_tokens: int,
    documents: torch.Tensor | None = None,
    closed: bool = False,
    has_gists: bool | None = None,
) -> CallPlan:
    """Plan for new tokens of known roles (bool ``[B, N]``; `valid` None means no padding).

    `documents` (bool ``[B, N]``) marks the first token of each where a sample packs several; the state is then empty.
    `closed` ends the last segment: its gists are kept, and no tail. `has_gists` is whether a token is a gist, None
    where the device has to be asked.

    Raises
    ------
    ValueError
        After a sliding layout. Under `gist_first`, if gist tokens extend a segment whose raw tokens came in
        an earlier call: their positions depend on the number of gists.
    """
    if state.moving:
        raise ValueError(
            "the cache was filled under a layout whose window moves (GistLayout.sliding): "
            "pass gist_layout with every call that goes on from it"
        )
    has_gists = bool(is_gist.any()) if has_gists is None else has_gists
    if valid is None and documents is None and not has_gists and not state.tail_has_gists:
        return plan_raw(state, is_gist.shape[1])
    new_valid = torch.ones_like(is_gist) if valid is None else valid
    left, arrange, all_valid, all_gist = _join_tail(state, is_gist & new_valid, new_valid)
    tail, rows = state.tail_columns, is_gist.shape[1]
    whole = layout_of(
        from_roles(
            all_gist,
            all_valid,
            sink_tokens=sink_tokens,
            past=state.gist_columns,
            past_rows=state.gist_rows,
            seen=state.seen - state.tail_rows,
            documents=documents,
        )
    )
    whole = whole.closed() if closed else whole
    layout = whole.last_rows(rows)
    if scheme == "gist_first" and tail:
        began_before = layout.local_begin < (tail + left)[:, None]
        late = is_gist & new_valid & began_before & (state.tail_rows > 0)[:, None]
        if late.any():
            raise ValueError(
                "positions='gist_first' needs a segment's raw tokens and its gist tokens in one call: "
                "this call brings gist tokens for raw tokens that the cache has read already"
            )
    position_ids = (layout.positions(scheme) + state.tail_position[:, None]).masked_fill(~layout.is_real(), 0)
    index = torch.arange(whole.num_rows, device=is_gist.device)
    before_tail = all_valid & (index < whole.keep_local[:, None])
    passed = before_tail & all_gist if scheme == "gist_first" else before_tail
    after, keep_gists, keep_tail = _finish(state, layout, all_valid, all_gist, state.tail_position + passed.sum(1))
    return CallPlan(layout, position_ids, after, arrange, keep_gists, keep_tail, valid)


def plan_layout(state: CacheState, layout: GistLayout, position_ids: torch.Tensor, is_gist: torch.Tensor) -> CallPlan:
    """Plan for a call whose layout and positions the caller gives."""
    if (layout.past, layout.tail) != (state.gist_columns, state.tail_columns):
        raise ValueError(
            f"gist_layout expects {layout.past} past and {layout.tail} tail rows, "
            f"the cache holds {state.gist_columns} and {state.tail_columns}"
        )
    check_kept(layout)
    real = layout.is_real()
    all_gist = torch.cat([state.tail_is_gist, is_gist & real], 1)
    all_valid = torch.cat([_tail_is_valid(state), real], 1)
    after, keep_gists, keep_tail = _finish(state, layout, all_valid, all_gist, state.tail_position)
    tail_position = _tail_position(state, layout, position_ids, real)
    # where the window has moved on from the last row, new rows need a layout of the same kind
    last_start = layout.local_begin.masked_fill(~real, -1).amax(1)
    moving = bool(((after.tail_rows > 0) & (layout.keep_local > last_start)).any())
    after = replace(after, tail_position=tail_position, moving=moving)
    return CallPlan(layout, position_ids, after, None, keep_gists, keep_tail, real)


def _tail_position(
    state: CacheState, layout: GistLayout, position_ids: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Position of the kept tail's first token; for an empty tail, right after the gists that stay."""
    beyond = torch.iinfo(torch.int64).max
    in_tail = real & (layout.row_index() >= layout.keep_local[:, None])
    first = position_ids.masked_fill(~in_tail, beyond).amin(1)
    slot = torch.arange(layout.past, layout.num_compact, device=real.device)
    stays = (layout.gather >= layout.tail) & (slot >= layout.keep_begin[:, None]) & (slot < layout.keep_end[:, None])
    row = (layout.gather - layout.tail).clamp(min=0)
    is_gist_row = stays & layout.is_gist.gather(1, row)
    last_gist = torch.where(is_gist_row, position_ids.gather(1, row), -1)
    empty = torch.nn.functional.pad(last_gist, (1, 0), value=-1).amax(1) + 1
    opened_earlier = layout.keep_local < layout.tail
    fresh = torch.where(first < beyond, first, torch.maximum(empty, state.tail_position))
    return torch.where(opened_earlier, state.tail_position, fresh)


def plan_raw(state: CacheState, rows: int) -> CallPlan:
    """So many new raw tokens for every sample, behind none but raw ones: nothing to read back from the device."""
    layout = layout_of(decode_rows(state.gist_rows, state.gist_columns, state.tail_rows, state.tail_columns, rows))
    after = replace(
        state,
        seen=state.seen + rows,
        tail_rows=state.tail_rows + rows,
        tail_is_gist=torch.nn.functional.pad(state.tail_is_gist, (0, rows)),
        tail_columns=state.tail_columns + rows,
        length=state.length + rows,
        fed=state.fed + rows,
    )
    start = state.tail_position + state.tail_rows
    return CallPlan(layout, layout.stream_position + start[:, None], after, raw=True)


def _join_tail(
    state: CacheState, is_gist: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Put the tail right in front of each sample's first real new token.

    Returns by how much it moves, the order of the local rows (None if nothing moves), and valid and is_gist over
    ``[tail | new]``.
    """
    tail, device = state.tail_columns, is_gist.device
    all_valid = torch.cat([_tail_is_valid(state), valid], 1)
    all_gist = torch.cat([state.tail_is_gist, is_gist], 1)
    left = (valid.long().cumsum(1) == 0).sum(1)
    if not tail or not bool((left > 0).any()):
        return left, None, all_valid, all_gist
    width = all_valid.shape[1]
    column = torch.arange(width, device=device).expand(len(left), -1)
    # tail columns move right over the sample's left padding, which moves to the front
    moved = column < (tail + left)[:, None]
    order = torch.where(moved, (column - left[:, None]) % (tail + left)[:, None], column)
    return left, order, all_valid.gather(1, order), all_gist.gather(1, order)


def _tail_is_valid(state: CacheState) -> torch.Tensor:
    """bool ``[B, T]``: which tail columns a sample owns."""
    column = torch.arange(state.tail_columns, device=state.seen.device)
    return column >= state.tail_columns - state.tail_rows[:, None]


def _finish(
    state: CacheState,
    layout: GistLayout,
    all_valid: torch.Tensor,
    all_gist: torch.Tensor,
    tail_position: torch.Tensor,
) -> tuple[CacheState, Kept, Kept]:
    """The state after the call, and which compact rows and which local rows stay, from `keep_*`."""
    index = torch.arange(1, all_valid.shape[1] + 1, device=all_valid.device)
    tail_end = (index * all_valid).amax(1)  # just behind the last real token
    tail_rows = (tail_end - layout.keep_local).clamp(min=0)
    gist_rows = layout.keep_end - layout.keep_begin
    # all valid columns less the old tail: a re-ordered call mixes the two
    seen = state.seen + all_valid.sum(1) - state.tail_rows
    open_gists = all_gist & all_valid & (index > layout.keep_local[:, None])
    most = torch.stack([gist_rows, tail_rows, seen, open_gists.sum(1), layout.keep_end, -layout.keep_end, -tail_end])
    gist_columns, tail_columns, length, gists, end, least_end, least_tail_end = most.amax(1).tolist()

    keep_gists = _kept(
        layout.keep_begin, gist_rows, gist_columns, end if end == -least_end else None, layout.num_compact
    )
    local = all_valid.shape[1]
    tail_begin = tail_end - tail_rows
    keep_tail = _kept(tail_begin, tail_rows, tail_columns, local if local == -least_tail_end else None, local)
    tail = _aligned(tail_begin, tail_rows, tail_columns)
    after = CacheState(
        seen,
        gist_rows,
        tail_rows,
        tail_position,
        all_gist.gather(1, tail.clamp(min=0)) & (tail >= 0),
        gist_columns,
        tail_columns,
        length,
        fed=state.fed + layout.num_rows,
        tail_has_gists=gists > 0,
    )
    return after, keep_gists, keep_tail


def _kept(begin: torch.Tensor, count: torch.Tensor, width: int, end: int | None, columns: int) -> Kept:
    """``begin .. begin + count - 1`` of the `columns` columns, right-aligned; a slice where they `end` alike."""
    if not width:
        return slice(columns, columns)
    if end is None:
        return _aligned(begin, count, width).clamp(min=0)
    return None if (width, end) == (columns, columns) else slice(end - width, end)


def _aligned(begin: torch.Tensor, count: torch.Tensor, width: int) -> torch.Tensor:
    """Indices ``begin .. begin + count - 1`` right-aligned in `width` columns, -1 before them."""
    slot = torch.arange(width, device=begin.device) - (width - count)[:, None]
    return torch.where(slot >= 0, begin[:, None] + slot, -1)
