"""What a cache has read, so that a prompt which does not go on from there is seen.

`generate` passes again what its cache has read after the compressed context, and counts alone would take any tokens for
those. They are kept as they are; of a context, whose tokens are what a cache spares, a digest is.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import torch

__all__ = ["PADDING", "UNKNOWN", "ContextRead", "RowsRead", "TokensRead"]

PADDING, UNKNOWN = -1, -2  # in place of ids: hidden columns, and those that came as embeddings
# the last tokens of a long context are left out of its digest: with a question behind it a tokenizer may cut them anew
_LOOSE_END = 8


class ContextRead(NamedTuple):
    """A context that was compressed: its tokens, how many of its first ones the digest covers, the digest."""

    tokens: int
    covered: int
    digest: str

    @classmethod
    def of(cls, ids: torch.Tensor) -> ContextRead:
        """Of the real tokens of one sample, int64 ``[tokens]``."""
        covered = len(ids) if len(ids) <= 2 * _LOOSE_END else len(ids) - _LOOSE_END
        return cls(len(ids), covered, _digest(ids[:covered]))

    @classmethod
    def parse(cls, text: str) -> ContextRead:
        """From how a file spells it; ValueError for what none does."""
        found = re.fullmatch(r"(\d{1,10}) (\d{1,10}) ([0-9a-f]{32})", text)
        if found is None or not 0 < int(found[2]) <= int(found[1]):
            raise ValueError(f"{text[:60]!r} is no digest of a context")
        return cls(int(found[1]), int(found[2]), found[3])

    def __str__(self) -> str:
        return f"{self.tokens} {self.covered} {self.digest}"

    def begins(self, ids: torch.Tensor) -> bool:
        """Whether `ids` (int64 ``[tokens]``, on the CPU) begin with this context."""
        return len(ids) >= self.covered and _digest(ids[: self.covered]) == self.digest


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.detach().cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()[:32]


class TokensRead:
    """Ids ``[B, columns]`` that came in calls since the context was compressed, in order.

    Nothing is computed when a call adds its own; they are joined when somebody asks.
    """

    def __init__(self, ids: torch.Tensor | None = None) -> None:
        self._parts: list[torch.Tensor] = [] if ids is None or not ids.shape[1] else [ids]

    def add(self, ids: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Columns of one more call, int64 ``[B, N]``; `valid` (bool ``[B, N]``) is false on padding."""
        # copies: a caller may write the next tokens into the same buffer
        self._parts.append(ids.clone() if valid is None else ids.masked_fill(~valid, PADDING))

    def ids(self) -> torch.Tensor | None:
        """All columns, int64 ``[B, columns]``; None where nothing was read."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, 1)]
        return self._parts[0] if self._parts else None

    def select(self, index: torch.Tensor) -> TokensRead:
        """Those of samples `index`, in that order."""
        ids = self.ids()
        return TokensRead(None if ids is None else ids[index.to(ids.device)])

    def crop(self, count: int) -> TokensRead:
        """Those but the last `count` columns."""
        ids = self.ids()
        return TokensRead(None if ids is None else ids[:, : max(0, ids.shape[1] - count)])

    def to(self, device: torch.device | str | None) -> TokensRead:
        """On another device."""
        ids = self.ids()
        return TokensRead(ids if ids is None or device is None else ids.to(device))

    def different(self, given: torch.Tensor) -> tuple[int, int, bool] | None:
        """Where `given` (int64 ``[B, N]``, `PADDING` on hidden columns) differs from what was read, or None.

        Returns
        -------
        (int, int, bool)
            Sample and column of the first difference, and whether the two differ about padding there.
        """
        ids = self.ids()
        if ids is None:
            return None
        given = given[:, : ids.shape[1]].to(ids.device)
        ids = ids[:, : given.shape[1]]
        unlike = (ids != given) & (ids != UNKNOWN)
        if not bool(unlike.any()):
            return None
        sample, column = unlike.nonzero()[0].tolist()
        return sample, column, bool((ids[sample, column] == PADDING) != (given[sample, column] == PADDING))


class RowsRead:
    """`TokensRead` of a cache of fixed size, which keeps the ids of its rows and not where padding was between them.

    Parameters
    ----------
    held : Tensor
        int64 ``[B, room + 1]``, of which a sample's first `length` (int32 ``[B]``) count.
    fed : int
        Columns that came, padding included.
    """

    def __init__(self, held: torch.Tensor, length: torch.Tensor, fed: int) -> None:
        self._held, self._length, self._fed = held, length, fed

    @staticmethod
    def write(held: torch.Tensor, columns: torch.Tensor, room: int) -> None:
        """Write the ids of `columns` (``[B, columns]``) that are no padding to a sample's first rows."""
        real = columns != PADDING
        place = (real.long().cumsum(1) - 1).masked_fill(~real, room).clamp(max=room)
        held.scatter_(1, place, columns)

    def ids(self) -> torch.Tensor | None:
        """All columns, int64 ``[B, columns]``; None where nothing was read, or some of it was padding."""
        if not self._fed or bool((self._length != self._fed).any()):
            return None
        return self._held[:, : self._fed]

    def different(self, given: torch.Tensor) -> tuple[int, int, bool] | None:
        """See `TokensRead.different`: padding may stand elsewhere, the tokens between it may not differ."""
        given = given[:, : self._fed].to(self._held.device)
        width = given.shape[1]
        rows = torch.full((len(given), width + 1), PADDING, device=given.device)
        RowsRead.write(rows, given, width)
        row = torch.arange(width, device=given.device)
        held = torch.nn.functional.pad(self._held[:, :width], (0, max(0, width - self._held.shape[1])), value=PADDING)
        held = held.masked_fill(row >= self._length[:, None], PADDING)
        unlike = (rows[:, :width] != held) & (held != UNKNOWN)
        if not bool(unlike.any()):
            return None
        sample, place = unlike.nonzero()[0].tolist()
        columns = (given[sample] != PADDING).nonzero().flatten().tolist()
        about_padding = PADDING in (int(rows[sample, place]), int(held[sample, place]))
        return sample, columns[place] if place < len(columns) else width - 1, about_padding
