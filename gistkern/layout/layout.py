"""The mask rule: which rows of the token stream see which keys.

A row sees exactly two intervals (docs/concepts/mask.md):

1. ``[gist_begin, gist_end)`` of the *compact rows*: the ``past`` rows that came with the call, followed by
   the rows that ``gather`` lists from this call;
2. ``[local_begin, i]`` of the *local rows*: its own segment, causally.

Nothing else in the project decides who sees whom.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ParamSpec

import torch

from gistkern.layout import compose, schemes, sharing
from gistkern.layout.arguments import check_count
from gistkern.layout.checks import check_now, check_once, check_shapes, trusted
from gistkern.layout.fields import LayoutFields
from gistkern.layout.plain import is_plain, marked
from gistkern.layout.positions import check_scheme

__all__ = ["GistLayout", "layout_of"]

_ROW_FIELDS = ("gist_begin", "gist_end", "local_begin")
_PICTURE_ROWS = 120  # a wider picture tells nothing in a terminal

Arguments = ParamSpec("Arguments")


def layout_of(made: LayoutFields, *sources: GistLayout) -> GistLayout:
    """The layout of what a scheme returned, whose values hold by construction: made of other layouts, if theirs do."""
    layout = GistLayout(**{field.name: getattr(made, field.name) for field in fields(made)})
    return trusted(marked(layout, is_plain(made)), *sources)


def _constructor(scheme: Callable[Arguments, LayoutFields]) -> Callable[Arguments, GistLayout]:
    """A constructor with the arguments and the docstring of a scheme, which stand there alone."""

    @functools.wraps(scheme)
    def construct(*args: Arguments.args, **kwargs: Arguments.kwargs) -> GistLayout:
        return layout_of(scheme(*args, **kwargs))

    signature = inspect.signature(scheme).replace(return_annotation="GistLayout")
    construct.__signature__ = signature  # type: ignore[attr-defined]
    return construct


@dataclass(frozen=True, eq=False)
class GistLayout(LayoutFields):
    """Which keys each token of a batch may attend to, as two intervals per token (per row of the stream).

    Build one with a constructor (`from_input_ids`, `from_segments`, `sliding`, `hierarchical`, `shared_segments`,
    `decode`) and combine them with `pack` (several documents in one row of the batch) and `stack` (a ragged batch).

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
        a padding entry of `gather`, or a row would see one token twice (docs/concepts/mask.md).

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

    def __post_init__(self) -> None:
        check_shapes(self)

    from_input_ids = staticmethod(_constructor(schemes.from_input_ids))
    from_segments = staticmethod(_constructor(schemes.from_segments))
    sliding = staticmethod(_constructor(schemes.sliding))
    hierarchical = staticmethod(_constructor(schemes.hierarchical))
    shared_segments = staticmethod(_constructor(sharing.shared_segments))
    decode = staticmethod(_constructor(schemes.decode))

    @staticmethod
    def pack(layouts: Sequence[GistLayout]) -> GistLayout:
        """Concatenate documents along N (varlen packing). No interval crosses a document.

        Examples
        --------
        >>> documents = [GistLayout.from_segments([3], gists=1, tail=2), GistLayout.from_segments([2], gists=1, tail=1)]
        >>> GistLayout.pack(documents).num_rows
        10
        """
        return layout_of(compose.pack(layouts), *layouts)

    @staticmethod
    def stack(layouts: Sequence[GistLayout], padding_side: str = "left") -> GistLayout:
        """Stack layouts along the batch, padding the shorter ones on `padding_side`.

        Examples
        --------
        >>> documents = [GistLayout.from_segments([3], gists=1, tail=2), GistLayout.from_segments([2], gists=1, tail=1)]
        >>> GistLayout.stack(documents).is_real().tolist()
        [[True, True, True, True, True, True], [False, False, True, True, True, True]]
        """
        return layout_of(compose.stack(layouts, padding_side), *layouts)

    # ---- derived facts

    @property
    def plain(self) -> bool:
        """Whether it hides nothing: every row sees all rows up to its own, no compact row, no tail. Never waits.

        Such a layout is plain causal attention, which torch's own kernels compute on a GPU (`gistkern.backends`). Known
        of layouts that a constructor made, or a method from such a layout; False of others, while compiling and of
        tensors made under `torch.inference_mode`, whatever they hide, and as soon as a vector is written in place.

        Examples
        --------
        >>> GistLayout.from_segments([6], gists=2).plain, GistLayout.from_segments([6], gists=2, tail=1).plain
        (True, False)
        """
        return is_plain(self)

    def positions(self, scheme: str) -> torch.Tensor:
        """int64 ``[B, N]`` positions, counted from the start of the call; padding rows have 0.

        Examples
        --------
        >>> layout = GistLayout.from_segments([3], gists=2, tail=2, sink_tokens=0)
        >>> layout.positions("absolute").tolist(), layout.positions("gist_first").tolist()
        ([[0, 1, 2, 3, 4, 5, 6]], [[2, 3, 4, 0, 1, 2, 3]])
        """
        check_scheme(scheme)
        return self.stream_position if scheme == "absolute" else self.gist_first_position

    def dense(self) -> torch.Tensor:
        """bool ``[B, N, G + M]``: compact columns, then local ones. For tests and pictures only.

        Examples
        --------
        >>> layout = GistLayout.from_segments([2], gists=1, tail=1, sink_tokens=0)
        >>> layout.dense()[0].int().tolist()  # one compact column, then the four tokens
        [[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [1, 0, 0, 0, 1]]
        """
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

        Examples
        --------
        >>> layout = GistLayout.from_segments([2], gists=1, tail=1, sink_tokens=0)
        >>> layout.token_mask()[0, -1].tolist()  # the last row sees the gist token and itself
        [False, False, True, True]
        """
        dense = self.dense()
        mask = dense[..., self.num_compact :].clone()
        gathered = dense[..., self.past : self.num_compact] & (self.gather >= 0)[:, None]
        index = self.gather.clamp(min=0)[:, None].expand(-1, self.num_rows, -1)
        hits = torch.zeros(mask.shape, dtype=torch.int32, device=self.device)
        return mask | (hits.scatter_add_(2, index, gathered.int()) > 0)

    def picture(self, sample: int = 0) -> str:
        """The token mask of one sample as text, ``g`` above marking gist tokens.

        `gistkern.layout.picture.save_png` draws it; ValueError where it is too wide for a terminal.

        Examples
        --------
        >>> print(GistLayout.from_segments([2], gists=1, tail=2, sink_tokens=0).picture())
          g
        █····
        ██···
        ███··
        ··██·
        ··███
        """
        if self.num_local > _PICTURE_ROWS:
            raise ValueError(
                f"a text picture holds {_PICTURE_ROWS} tokens, the layout has {self.num_local}: use save_png"
            )
        marks = " " * self.tail + "".join("g" if gist else " " for gist in self.is_gist[sample].tolist())
        mask = self.token_mask()[sample].tolist()
        return "\n".join([marks, *("".join("█" if seen else "·" for seen in row) for row in mask)])

    # ---- new layouts from this one

    def to(self, device: torch.device | str) -> GistLayout:
        """The same layout with its tensors on `device`."""
        return marked(layout_of(self.on(device), self), self.plain)

    def last_rows(self, count: int) -> GistLayout:
        """The layout of the last `count` rows alone; the rows before them become tail rows.

        Examples
        --------
        >>> layout = GistLayout.from_segments([2], gists=1, tail=3)
        >>> layout.last_rows(2).num_rows, layout.last_rows(2).tail
        (2, 4)
        """
        if not isinstance(count, int) or not 0 < count <= self.num_rows:
            raise ValueError(f"count must lie in 1..{self.num_rows} (the rows of the layout), got {count!r}")
        cut = (*_ROW_FIELDS, "is_gist", "stream_position", "gist_first_position")
        rows: dict[str, Any] = {name: getattr(self, name)[:, -count:] for name in cut}
        last = replace(self, **rows, tail=self.num_local - count)
        return trusted(marked(last, self.plain and not last.tail), self)

    def windowed(self, window: int) -> GistLayout:
        """The layout of layers with a sliding window: of the local rows, a row sees the last `window` at most.

        It counts itself, as transformers does. Compact rows stay visible, and what a cache keeps stays the same.

        Examples
        --------
        >>> layout = GistLayout.from_segments([2], gists=1, tail=3, sink_tokens=0)
        >>> print(layout.windowed(2).token_mask()[0].int())
        tensor([[1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [0, 1, 1, 0, 0, 0],
                [0, 0, 1, 1, 0, 0],
                [0, 0, 1, 1, 1, 0],
                [0, 0, 1, 0, 1, 1]], dtype=torch.int32)
        """
        check_count("window", window, least=1)
        if window >= self.num_local:
            return self
        check_once(self)  # so that a layout which comes with many calls is looked at once, not each window of each call
        start = torch.maximum(self.local_begin, self.row_index() + (1 - window))
        return trusted(replace(self, local_begin=start), self)

    def closed(self) -> GistLayout:
        """The same rows, with the open segment ended: a cache then keeps its gists and drops the rest."""
        count = (self.gather >= 0).sum(1)
        local = torch.full_like(self.keep_local, self.num_local)
        return trusted(marked(replace(self, keep_end=self.past + count, keep_local=local), self.plain), self)
