"""Gist rows read where they stand: a pool that samples share, and rows that are quantized.

The kernels under `gistkern.gist_decode` take rows ``[R, Hkv, D]`` and an interval of them for each sequence. Rows that
stand once for several samples are such a pool; so are a sample's own, ``[B, Hkv, G, D]``, if they lie row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gistkern.cache.plan import CacheState, CallPlan
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.layout import GistLayout
from gistkern.ops.attention import AttentionOptions
from gistkern.ops.decode import Decodes, Seen
from gistkern.rows import KeyValueRows, dequantize_rows

__all__ = ["PoolIntervals", "base_of", "decodes", "gathered", "pooled", "row_by_row"]


# kinds of layers and devices whose intervals are kept
_MOST = 8


@dataclass
class PoolIntervals:
    """What the rows of a call see of a pool.

    Parameters
    ----------
    base : Tensor
        int64 ``[B, 1]``: what is added to a sample's column to find its row in the pool.
    begin, end : Tensor
        int32 ``[B, N]``: the pool's rows ``[begin, end)``.
    made_of : (Tensor, Tensor or None)
        What they were made of: the layout's `gist_begin`, and where each sample's rows begin if samples share them.
    """

    base: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    made_of: tuple[torch.Tensor, torch.Tensor | None]
    decodes: Decodes = field(default_factory=Decodes)
    # by device and layout.local_begin, which stays the same from step to step where layers have no window
    seen: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.device, Seen]] = field(default_factory=dict)
    last: tuple[torch.Tensor, torch.device, Seen] | None = None  # of the layer before

    @classmethod
    def of(
        cls,
        plan: CallPlan,
        state: CacheState | None,
        first: torch.Tensor | None,
        known: PoolIntervals | None,
    ) -> PoolIntervals:
        """Of a call whose samples' rows begin at `first` in a pool that they share; None: each has rows of its own.

        Those are ``layout.past`` columns, one sample behind the other. `known` are the intervals of the call before,
        which stay the same from one decode step to the next.
        """
        layout = plan.layout
        if first is not None:
            assert state is not None
            _refuse_changes(state, plan)
        if known is not None and plan.raw and known.made_of[0] is layout.gist_begin and known.made_of[1] is first:
            return known
        if first is None or state is None:
            base = layout.past * torch.arange(layout.batch_size, device=layout.device)[:, None]
        else:
            base = base_of(state, first)
        begin, end = ((column + base).int() for column in (layout.gist_begin, layout.gist_end))
        return cls(base, begin, end, (layout.gist_begin, first))

    def decode(
        self,
        q: torch.Tensor,
        pool: KeyValueRows,
        local: tuple[torch.Tensor, torch.Tensor],
        layout: GistLayout,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Attention of up to 8 query rows over the pool and the local rows ``[B, Hkv, M, D]``."""
        local_begin = layout.local_begin
        last = self.last
        if last is None or last[0] is not local_begin or last[1] != q.device:
            last = self.last = self._seen(local_begin, q.shape[2], q.device)
        return self.decodes.decode(q, pool, local, last[2], layout.past, options)

    def _seen(
        self, local_begin: torch.Tensor, rows: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.device, Seen]:
        found = self.seen.get((device, id(local_begin)))
        if found is None:
            if len(self.seen) >= _MOST:
                self.seen.clear()
            of = Seen.of(rows, self.begin.to(device), self.end.to(device), None, local_begin)
            # the tensor is held, so that its id is no other's
            found = self.seen[device, id(local_begin)] = local_begin, device, of
        return found


def base_of(state: CacheState, first: torch.Tensor) -> torch.Tensor:
    """int64 ``[B, 1]``: from a sample's column to its row in a pool where its rows begin at `first`."""
    return (first - (state.gist_columns - state.gist_rows))[:, None]


def decodes(q: torch.Tensor, learns: bool) -> bool:
    """Whether `gist_decode` takes the call; the others need the rows of each sample side by side."""
    return q.shape[2] <= DECODE_ROWS and q.dtype != torch.float64 and not learns


def gathered(pool: KeyValueRows, base: torch.Tensor, columns: int, dtype: torch.dtype) -> KeyValueRows:
    """Each sample's rows ``[B, Hkv, G, D]`` copied out of a pool; columns that it does not own hold rows of others."""
    place = (torch.arange(columns, device=base.device) + base).clamp(min=0).to(pool.key.device)
    return dequantize_rows(pool.map(lambda t: t[place].transpose(1, 2)), dtype)


def pooled(rows: KeyValueRows) -> KeyValueRows:
    """Rows ``[B, Hkv, G, D]`` that lie row by row as a pool ``[B * G, Hkv, D]``: the same memory."""
    if torch.compiler.is_compiling():
        return rows.map(lambda t: t.transpose(1, 2).flatten(0, 1))
    kept = rows.__dict__
    if "_pooled" not in kept:  # asked by every decode step
        kept["_pooled"] = rows.map(lambda t: t.transpose(1, 2).flatten(0, 1))
    return kept["_pooled"]


def row_by_row(rows: KeyValueRows) -> KeyValueRows:
    """Rows ``[B, Hkv, G, D]`` in the order of memory that `pooled` needs; copied unless they are."""
    return rows.map(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))


def _refuse_changes(state: CacheState, plan: CallPlan) -> None:
    """Raise ValueError if a call would add to the rows that samples share, or drop some."""
    layout = plan.layout
    if (layout.gather.shape[1] or plan.after.tail_has_gists) and bool(layout.is_gist.any()):
        raise ValueError(
            "a shared cache cannot take gist tokens after its context: pass a cache of its own, "
            "GistStore.batch(names) or the one that shared() was called on"
        )
    if plan.after.gist_rows is not state.gist_rows and not torch.equal(plan.after.gist_rows, state.gist_rows):
        raise ValueError("a shared cache keeps all rows of its context: this gist_layout would drop or add some")
