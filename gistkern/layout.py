"""The mask rule: which rows of the token stream see which keys.

A row sees exactly two intervals (docs/mask.md):

1. ``[gist_begin, gist_end)`` of the *compact rows*: the ``past`` rows that came with the call, followed by
   the rows that ``gather`` lists from this call;
2. ``[local_begin, i]`` of the *local rows*: its own segment, causally.

Nothing else in the project decides who sees whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from gistkern.layout_checks import check_now, check_shapes, trusted

__all__ = ["GistLayout"]

_ROW_FIELDS = ("gist_begin", "gist_end", "local_begin")


@dataclass(frozen=True, eq=False)
class GistLayout:
    """Visibility of every row of a batch of token streams, as two intervals per row.

    Build one with a constructor (`from_input_ids`, `from_segments`, `sliding`, `hierarchical`, `decode`)
    and combine them with `pack` (several documents in one row of the batch) and `stack` (a ragged batch).

    Parameters
    ----------
    gist_begin, gist_end, local_begin : Tensor
        int32 ``[B, N]``. Each is non-decreasing along N. `local_begin` counts local rows, of which the
        first `tail` came from earlier calls, so row ``i`` of the call is local row ``tail + i``.
        A padding row is empty: ``gist_begin == gist_end`` and ``local_begin == tail + i + 1``.
    gather : Tensor
        int64 ``[B, G - past]``: the local row that fills each compact row; -1 where a ragged batch has none.
    past : int
        Compact rows that come with the call, in front of the gathered ones.
    tail : int
        Local rows that come with the call, in front of its own N rows.
    is_gist : Tensor
        bool ``[B, N]``: which rows are gist tokens.
    stream_position, gist_first_position : Tensor
        int64 ``[B, N]``: positions under the two schemes, counted from the start of the call.
    keep_begin, keep_end, keep_local : Tensor
        int64 ``[B]``: what a later row may still see, hence what a cache keeps after this call: the compact
        rows ``[keep_begin, keep_end)`` and the local rows from `keep_local` on.

    Raises
    ------
    ValueError
        If shapes, types or devices disagree. Values are checked where they are used: `gist_attention`, `dense` and
        `token_mask` raise ValueError if an interval or an entry of `gather` leaves its buffer, whatever the backend,
        compiled or not, and however the layout came about; eager calls also if a vector decreases, a row would see
        a padding entry of `gather`, or a row would see one token twice (docs/mask.md).

    Examples
    --------
    Two segments of two tokens, each closed by one gist, then a question of two tokens:

    >>> layout = GistLayout.from_segments([2, 2], gists=1, tail=2, sink_tokens=0)
    >>> print(layout.token_mask()[0].int())
    tensor([[1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 0, 1, 0, 0, 1, 1, 0],
            [0, 0, 1, 0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    gist_begin: torch.Tensor
    gist_end: torch.Tensor
    local_begin: torch.Tensor
    gather: torch.Tensor
    is_gist: torch.Tensor
    stream_position: torch.Tensor
    gist_first_position: torch.Tensor
    keep_begin: torch.Tensor
    keep_end: torch.Tensor
    keep_local: torch.Tensor
    past: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        check_shapes(self)

    # ---- constructors: the schemes themselves live in schemes.py and compose.py

    @classmethod
    def from_input_ids(
        cls,
        input_ids: torch.Tensor,
        gist_token_ids: Sequence[int] | torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        sink_tokens: int = 1,
        past: int | torch.Tensor = 0,
    ) -> GistLayout:
        """Read the segments off the ids: a run of gist tokens followed by another token ends a segment.

        Parameters
        ----------
        input_ids : Tensor
            Integer ``[B, N]``.
        gist_token_ids : sequence of int
            The ids of the gist tokens.
        attention_mask : Tensor, optional
            ``[B, N]``, nonzero for real tokens. Padding may stand left, right or on both sides.
        sink_tokens : int
            So many first real tokens of the document stay visible for ever (the attention sink of
            Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks").
        past : int or Tensor
            Compact rows that come with the call; an int ``[B]`` tensor where samples own different
            numbers of them (then they stand right-aligned in a buffer of ``past.max()`` rows).
            With past rows the call continues a document, so it has no sink of its own.

        Raises
        ------
        ValueError
            On a wrong shape or dtype, no or repeated gist ids, a mask with holes, a negative count.

        Examples
        --------
        >>> ids = torch.tensor([[5, 6, 9, 7, 8]])
        >>> GistLayout.from_input_ids(ids, [9], sink_tokens=0).token_mask()[0, 3].tolist()
        [False, False, True, True, False]
        """
        from gistkern import schemes

        return schemes.from_input_ids(input_ids, gist_token_ids, attention_mask, sink_tokens, past)

    @classmethod
    def from_segments(
        cls,
        lengths: Sequence[int],
        gists: int | Sequence[int],
        *,
        tail: int = 0,
        sink_tokens: int = 1,
        past: int = 0,
        device: torch.device | str = "cpu",
    ) -> GistLayout:
        """One document of explicit segments: ``lengths[s]`` raw tokens, then ``gists`` (or ``gists[s]``) gists.

        `tail` raw tokens (the question and answer) follow the last segment. Batch size 1.
        """
        from gistkern import schemes

        return schemes.from_segments(lengths, gists, tail, sink_tokens, past, device)

    @classmethod
    def sliding(
        cls,
        n: int,
        window: int,
        stride: int,
        *,
        gists: int = 1,
        sink_tokens: int = 1,
        device: torch.device | str = "cpu",
    ) -> GistLayout:
        """A local window over `n` rows in which every `stride` raw tokens are followed by `gists` gist tokens.

        A row sees the last `window` rows, itself included, and the gists (and sinks) older than that.
        Batch size 1.
        """
        from gistkern import schemes

        return schemes.sliding(n, window, stride, gists, sink_tokens, device)

    @classmethod
    def hierarchical(
        cls,
        lengths: Sequence[int],
        segment_gists: int,
        summary_gists: int,
        *,
        tail: int = 0,
        see_earlier_gists: bool = False,
        sink_tokens: int = 1,
        device: torch.device | str = "cpu",
    ) -> GistLayout:
        """Gists of gists: each segment writes `segment_gists`, then `summary_gists` see all of those.

        The `tail` rows, and every later call, see the sinks and the summary gists only. Segments see
        nothing outside themselves, or the earlier segments' gists with `see_earlier_gists`. Batch size 1.
        """
        from gistkern import schemes

        return schemes.hierarchical(lengths, segment_gists, summary_gists, tail, see_earlier_gists, sink_tokens, device)

    @classmethod
    def decode(
        cls,
        past: int | torch.Tensor,
        tail: int | torch.Tensor = 0,
        *,
        rows: int = 1,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> GistLayout:
        """`rows` new raw rows that see all past rows and the tail: the layout of a decoding step.

        `past` and `tail` are int, or int ``[B]`` tensors of per-sample counts, right-aligned.
        """
        from gistkern import schemes

        return schemes.decode(past, tail, rows, batch_size, device)

    @staticmethod
    def pack(layouts: Sequence[GistLayout]) -> GistLayout:
        """Concatenate documents along N (varlen packing). No interval crosses a document."""
        from gistkern import compose

        return compose.pack(layouts)

    @staticmethod
    def stack(layouts: Sequence[GistLayout], padding_side: str = "left") -> GistLayout:
        """Stack layouts along the batch, padding the shorter ones on `padding_side`."""
        from gistkern import compose

        return compose.stack(layouts, padding_side)

    # ---- derived facts

    @property
    def batch_size(self) -> int:
        """B: samples."""
        return self.gist_begin.shape[0]

    @property
    def num_rows(self) -> int:
        """N: query rows of the call."""
        return self.gist_begin.shape[1]

    @property
    def num_local(self) -> int:
        """M: local key rows, ``tail + N``."""
        return self.tail + self.num_rows

    @property
    def num_compact(self) -> int:
        """G: compact key rows, ``past`` plus gathered."""
        return self.past + self.gather.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the layout's tensors are."""
        return self.gist_begin.device

    def row_index(self) -> torch.Tensor:
        """Local row of every query row, int32 ``[N]``."""
        return torch.arange(self.tail, self.num_local, dtype=torch.int32, device=self.device)

    def is_real(self) -> torch.Tensor:
        """bool ``[B, N]``: rows that are not padding (a real row always sees itself)."""
        return self.local_begin <= self.row_index()

    def positions(self, scheme: str) -> torch.Tensor:
        """int64 ``[B, N]`` positions, counted from the start of the call; padding rows have 0."""
        from gistkern.positions import check_scheme

        check_scheme(scheme)
        return self.stream_position if scheme == "absolute" else self.gist_first_position

    def dense(self) -> torch.Tensor:
        """bool ``[B, N, G + M]``: compact columns, then local ones. For tests and pictures only."""
        check_now(self)
        compact = torch.arange(self.num_compact, device=self.device)
        local = torch.arange(self.num_local, device=self.device)
        begin, end, start = (getattr(self, name)[..., None] for name in _ROW_FIELDS)
        sees_gist = (compact >= begin) & (compact < end)
        sees_local = (local >= start) & (local <= self.row_index()[:, None])
        return torch.cat([sees_gist, sees_local], dim=-1)

    def token_mask(self) -> torch.Tensor:
        """bool ``[B, N, M]``: ``[b, i, j]`` is true iff row i sees local row j, directly or as a gathered gist.

        Without a tail that is ``[B, N, N]`` in token coordinates. Past rows are not tokens of the call.
        """
        dense = self.dense()
        mask = dense[..., self.num_compact :].clone()
        gathered = dense[..., self.past : self.num_compact] & (self.gather >= 0)[:, None]
        index = self.gather.clamp(min=0)[:, None].expand(-1, self.num_rows, -1)
        hits = torch.zeros(mask.shape, dtype=torch.int32, device=self.device)
        return mask | (hits.scatter_add_(2, index, gathered.int()) > 0)

    def picture(self, sample: int = 0) -> str:
        """The token mask of one sample as text; `gistkern.mask_picture.save_png` draws it."""
        from gistkern.mask_picture import text

        return text(self, sample)

    # ---- new layouts from this one

    def to(self, device: torch.device | str) -> GistLayout:
        """The same layout with its tensors on `device`."""
        mine: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        mine = {name: value.to(device) if torch.is_tensor(value) else value for name, value in mine.items()}
        return trusted(GistLayout(**mine), self)

    def last_rows(self, count: int) -> GistLayout:
        """The layout of the last `count` rows alone; the rows before them become tail rows."""
        if not isinstance(count, int) or not 0 < count <= self.num_rows:
            raise ValueError(f"count must lie in 1..{self.num_rows} (the rows of the layout), got {count!r}")
        cut = (*_ROW_FIELDS, "is_gist", "stream_position", "gist_first_position")
        rows: dict[str, Any] = {name: getattr(self, name)[:, -count:] for name in cut}
        return trusted(replace(self, **rows, tail=self.num_local - count), self)

    def closed(self) -> GistLayout:
        """The same rows, with the open segment ended: a cache then keeps its gists and drops the rest."""
        count = (self.gather >= 0).sum(1)
        local = torch.full_like(self.keep_local, self.num_local)
        return trusted(replace(self, keep_end=self.past + count, keep_local=local), self)
