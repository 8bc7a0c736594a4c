"""Cut one long context into shards, one per rank: which rows, which gist rows they owe the others, what they see.

A shard's rows keep their two intervals. Gist intervals are over the compact rows of the *whole* context, which every
rank gathers (collectives.py) and gets as `past` rows; local rows that begin before the shard (a sliding window, a
segment longer than a shard) come from the rank before as `tail` rows. So a shard is an ordinary layout for the ordinary
op.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gistkern.layout import GistLayout

__all__ = ["ContextShard", "exchange", "row_work", "split_layout"]

UNEVEN = 1.25  # times the mean work
_ROWS = ("gist_begin", "gist_end", "is_gist", "stream_position", "gist_first_position")


@dataclass(frozen=True)
class ContextShard:
    """The part of a context that one rank computes: its rows, and what it exchanges with the other ranks.

    Parameters
    ----------
    rank, begin, end : int
        The shard's rows of the context are ``[begin, end)``.
    cuts : tuple of int
        First rows of all ranks' shards, then the number of rows.
    halos : tuple of int
        Local rows that each rank needs from the one before it.
    layout : GistLayout
        Of the shard's rows: ``past`` all compact rows of the context, ``tail`` the rank's halo.
    own : Tensor
        int64 ``[B, W]``: the shard's rows that fill compact rows, -1 where it has fewer than `W`.
    place : Tensor
        int64 ``[B, G]``: where each compact row stands among all ranks' ``own`` rows, one rank after the other.
    work : float
        Cost of the shard's rows, as `row_work` counts it.

    Examples
    --------
    >>> from gistkern.distributed import split_layout
    >>> layout = GistLayout.from_segments([30, 30, 30, 30], gists=2, tail=4)
    >>> first, second = split_layout(layout, 2)
    >>> (first.begin, first.end), (second.begin, second.end)
    ((0, 64), (64, 132))
    >>> second.take(torch.zeros(1, 132, 16)).shape
    torch.Size([1, 68, 16])
    """

    rank: int
    begin: int
    end: int
    cuts: tuple[int, ...]
    halos: tuple[int, ...]
    layout: GistLayout
    own: torch.Tensor
    place: torch.Tensor
    work: float

    def take(self, rows: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The shard's rows of a tensor of the whole context."""
        return rows.narrow(dim, self.begin, self.end - self.begin)


def row_work(layout: GistLayout, row_cost: float = 0.0) -> torch.Tensor:
    """Work of each row, float64 ``[N]``: the keys that it sees, over the batch, plus `row_cost` for each real row.

    `row_cost` is what everything but attention costs a row (projections, MLP), in pairs.

    Examples
    --------
    >>> from gistkern.distributed import row_work
    >>> layout = GistLayout.from_segments([30, 30, 30, 30], gists=2, tail=4)
    >>> row_work(layout)[[0, 29, 32, 131]]  # of its own segment, and gist rows and sinks
    tensor([ 1., 30.,  4., 13.], dtype=torch.float64)
    """
    own = layout.row_index() + 1 - layout.local_begin
    pairs = (layout.gist_end - layout.gist_begin).clamp(min=0) + own.clamp(min=0)
    return (pairs.double() + row_cost * layout.is_real()).sum(0)


def split_layout(layout: GistLayout, parts: int, row_cost: float = 0.0) -> tuple[ContextShard, ...]:
    """Shards of equal work, cut between segments where that is possible.

    Parameters
    ----------
    layout : GistLayout
        Of the whole context, without rows of earlier calls; a batch is cut at the same rows for all samples.
    parts : int
        Ranks.
    row_cost : float
        As `row_work`.

    Raises
    ------
    ValueError
        If the layout continues another call, has fewer rows than `parts`, or cannot be cut so that a shard's local
        rows lie in itself and the shard before (a text without segments beyond two ranks).

    Warns
    -----
    UserWarning
        If the heaviest shard has more than `UNEVEN` times the mean work, which all others will wait for.

    Examples
    --------
    >>> from gistkern.distributed import split_layout
    >>> layout = GistLayout.from_segments([30, 30, 30, 30], gists=2, tail=4)
    >>> [shard.work for shard in split_layout(layout, 2)]
    [1152.0, 1486.0]
    """
    if layout.past or layout.tail:
        raise ValueError("a context is split from its first row on: this layout has past or tail rows")
    if not 1 <= parts <= layout.num_rows:
        raise ValueError(f"{layout.num_rows} rows cannot be split into {parts} shards")
    work = row_work(layout, row_cost)
    reach = layout.local_begin.min(0).values.cpu().numpy()  # the first local row that any sample's row sees
    cuts = [0, *_cuts(reach, work.cumsum(0).cpu().numpy(), parts), layout.num_rows]
    halos = tuple(max(0, begin - int(reach[begin])) for begin in cuts[:-1])
    own, place = exchange(layout.gather, cuts)
    shards = tuple(
        ContextShard(
            rank=rank,
            begin=begin,
            end=end,
            cuts=tuple(cuts),
            halos=halos,
            layout=_shard(layout, begin, end, halos[rank]),
            own=own[rank],
            place=place,
            work=float(work[begin:end].sum()),
        )
        for rank, (begin, end) in enumerate(itertools.pairwise(cuts))
    )
    mean = float(work.sum()) / parts
    heaviest = max(shard.work for shard in shards)
    if heaviest > UNEVEN * mean:
        warnings.warn(
            f"the heaviest of {parts} shards has {heaviest / mean:.1f} times the mean work, and the others wait: "
            "use shorter segments, or fewer ranks",
            stacklevel=2,
        )
    return shards


def _cuts(reach: np.ndarray, total: np.ndarray, parts: int) -> list[int]:
    """First rows of all shards but the first.

    `reach` is the first local row that each row sees, `total` the work up to and with each row.
    """
    found = _greedy(reach, total, parts)
    done = np.concatenate([[0.0], total])
    heaviest = np.diff(done[[0, *found, len(reach)]]).max()
    if len(found) == parts - 1 and heaviest <= UNEVEN * total[-1] / parts:
        return found
    return _smallest_bound(reach, total, parts)


def _greedy(reach: np.ndarray, total: np.ndarray, parts: int) -> list[int]:
    """Each where the work that is left is shared evenly by the ranks left; fewer if that leads nowhere.

    A row that sees no local row before itself is preferred, up to half a shard's work away.
    """
    found: list[int] = []
    for part in range(1, parts):
        before = found[-1] if found else 0
        done = total[before - 1] if before else 0.0
        share = (total[-1] - done) / (parts - part + 1)
        # a halo comes from one rank, so it must not reach past the shard before
        first = max(before + 1, int(np.searchsorted(reach, before)))
        last = max(first, int(np.searchsorted(total, done + 2 * share)) + 1)  # a cut beyond is never the nearest
        cuts = np.arange(first, min(last + 1, len(reach) - (parts - part) + 1))
        if not len(cuts):
            break
        distance = np.abs(total[cuts - 1] - done - share)
        free = np.where(reach[cuts] >= cuts, distance, np.inf)
        found.append(int(cuts[(free if free.min() <= share / 2 else distance).argmin()]))
    return found


def _smallest_bound(reach: np.ndarray, total: np.ndarray, parts: int) -> list[int]:
    """The cuts whose heaviest shard is lightest, by bisection over its work; ValueError if there are none."""
    low, high = total[-1] / parts, float(total[-1])
    best = _within(reach, total, parts, high)
    if best is None:
        raise ValueError(
            f"the context cannot be cut into {parts} shards whose local rows lie in themselves and the shard before: "
            "use shorter segments or windows, or fewer ranks"
        )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        found = _within(reach, total, parts, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _within(reach: np.ndarray, total: np.ndarray, parts: int, bound: float) -> list[int] | None:
    """Cuts into shards of at most `bound` work, or None: which rows can begin a shard is followed from rank to rank.

    Behind a shard that begins at row b, the next begins within an interval: not before the first row that sees no local
    row before b, not after the last one up to which the work is within the bound.
    """
    rows = len(reach)
    done = np.concatenate([[0.0], total])  # work before each row
    begins = np.arange(rows)
    first = np.maximum(np.searchsorted(reach, begins), begins + 1)
    # rounding of the sums must not exclude what is exactly at the bound
    last = np.searchsorted(done, done[:-1] + bound * (1 + 1e-12), side="right") - 1
    reachable = [begins == 0]
    for _ in range(parts - 1):
        start = reachable[-1] & (first <= np.minimum(last, rows - 1))
        opened = np.bincount(first[start], minlength=rows + 1)
        closed = np.bincount(np.minimum(last[start], rows - 1) + 1, minlength=rows + 1)
        reachable.append((opened - closed).cumsum()[:rows] > 0)
    ends = reachable[-1] & (last >= rows)
    if not ends.any():
        return None
    cuts = [int(ends.argmax())]
    for part in range(parts - 2, 0, -1):
        leads = reachable[part] & (first <= cuts[0]) & (last >= cuts[0])
        cuts.insert(0, int(leads.argmax()))
    return cuts


def _shard(layout: GistLayout, begin: int, end: int, halo: int) -> GistLayout:
    rows: dict[str, Any] = {name: getattr(layout, name)[:, begin:end].contiguous() for name in _ROWS}
    none = torch.zeros_like(layout.keep_begin)
    return replace(
        layout,
        **rows,
        local_begin=(layout.local_begin[:, begin:end] - (begin - halo)).contiguous(),
        gather=layout.gather[:, :0],
        past=layout.num_compact,
        tail=halo,
        # shards are not cached
        keep_begin=none,
        keep_end=none,
        keep_local=torch.full_like(none, halo + end - begin),
    )


def exchange(gather: torch.Tensor, cuts: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """For each rank the rows that it owes, padded to the most that one does, and where all compact rows then stand."""
    bounds = torch.tensor(cuts[1:], device=gather.device)
    rank = torch.bucketize(gather, bounds, right=True)  # of every compact row; -1 counts to rank 0
    real = gather >= 0
    owed = [real & (rank == one) for one in range(len(bounds))]
    width = max(1, int(torch.stack([one.sum(1) for one in owed]).max())) if gather.numel() else 1
    place = torch.zeros_like(gather)
    own = []
    for one, mine in enumerate(owed):
        index = mine.cumsum(1) - 1
        rows = gather.new_full((len(gather), width), -1)
        sample, column = mine.nonzero(as_tuple=True)
        rows[sample, index[sample, column]] = gather[sample, column] - cuts[one]
        place = torch.where(mine, one * width + index, place)
        own.append(rows)
    return own, place
