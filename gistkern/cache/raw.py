"""Raw rows of a compressed context, off the device: what `GistCache.restore` brings back for a question.

They are copied in the calls that compress, as the layers compute them: keys turned to their own positions, by tokens
that saw their own segment and the gists of earlier ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gistkern.cache import raw_file
from gistkern.cache.host_plan import Call
from gistkern.cache.raw_file import RawOrigin, RawSegment
from gistkern.rows import KeyValueRows, check_gist_dtype, quantize_rows

__all__ = ["RawSegments", "Recording", "copyable"]


class RawSegments:
    """Keys and values of the raw tokens of each segment of a compressed context, in the host's memory or in a file.

    `gistkern.compress` makes them with ``keep_raw``, and they are the cache's `raw`. They never change, so that clones
    of a cache hold the same ones.

    Attributes
    ----------
    segments : sequence of RawSegment
        Of each segment its sample, the ids and positions of its raw tokens, and how many of them have rows here (those
        that are attention sinks are gist rows already).
    path : Path or None
        The file that holds the rows; None where they are in memory.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> context = tokenizer("The bell is with Mira. The lamp is with Jonas.")["input_ids"]
    >>> cache = gistkern.compress(model, context, segment_length=8, keep_raw="mira.raw.safetensors")
    >>> len(cache.raw.segments), cache.raw.segments[1].ids.tolist() == context[8:16]
    (2, True)
    >>> cache.raw.rows(1).key.shape  # layers, rows, key/value heads, head dimension
    torch.Size([2, 5, 2, 16])
    """

    def __init__(
        self,
        origin: RawOrigin,
        segments: Sequence[RawSegment],
        rows: Sequence[KeyValueRows] | raw_file.RowsInFile,
        index: torch.Tensor | None,
        samples: torch.Tensor | None = None,
    ) -> None:
        self.origin, self.segments = origin, segments
        self._rows, self._index, self._samples = rows, index, samples

    def __repr__(self) -> str:
        place = "in memory" if self.path is None else f"in {self.path}"
        return f"RawSegments({len(self.segments)} segments, {self.nbytes} bytes {place})"

    @property
    def path(self) -> Any:
        """The file that holds the rows, or None."""
        return getattr(self._rows, "path", None)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, in memory or in the file."""
        index = 0 if self._index is None else self._index.nbytes
        if isinstance(self._rows, raw_file.RowsInFile):
            return self._rows.nbytes + index
        return sum(rows.nbytes for rows in self._rows) + index

    def samples(self) -> list[int]:
        """Which of the samples that were compressed each sample of the cache is."""
        return list(range(len(self.origin.seen))) if self._samples is None else self._samples.tolist()

    def select(self, indices: torch.Tensor) -> RawSegments:
        """Those of samples `indices`, in that order: the same rows."""
        indices = indices if self._samples is None else self._samples[indices.to(self._samples.device)]
        return RawSegments(self.origin, self.segments, self._rows, self._index, indices)

    def of_sample(self, sample: int) -> list[int]:
        """Numbers of a compressed sample's segments, in the order of its tokens."""
        return [number for number, one in enumerate(self.segments) if one.sample == sample]

    def rows(self, number: int) -> KeyValueRows:
        """Keys and values ``[layers, rows, Hkv, D]`` of one segment, on the CPU.

        ValueError where the file that holds them is torn, FileNotFoundError where it is gone.
        """
        return self._rows[number]

    def index(self, layer: int, number: int) -> torch.Tensor | None:
        """Keys ``[gists, Hkv, D]`` of a segment's own gists, where the cache does not hold them; else None."""
        if self._index is None:
            return None
        gists = self.origin.gists
        return self._index[layer, number * gists : (number + 1) * gists]

    def cuts(self) -> tuple[str, ...]:
        """Of each sample of the cache a digest of its tokens and of where it was cut into segments."""
        digests: dict[int, Any] = {sample: hashlib.sha256() for sample in self.samples()}
        for one in self.segments:
            if one.sample in digests:
                digests[one.sample].update(np.array([len(one.ids), one.rows, one.gist_row]).tobytes())
                digests[one.sample].update(one.ids.tobytes() + one.positions.tobytes())
        return tuple(digests[sample].hexdigest() for sample in self.samples())

    def check(self, origin: Any, state: Any, cuts: Sequence[str] | None = None) -> None:
        """Raise ValueError unless they are of the compression that a cache of this origin and state came from.

        `cuts` are what the cache's file says of them (`GistCache.contexts` leaves out a context's end, and its cut).
        """
        mine, samples = self.origin, self.samples()
        wanted = (mine.positions, mine.fingerprint)
        found = (origin.positions, origin.fingerprint)
        known = {mine.contexts[sample] for sample in samples} <= set(map(str, origin.contexts))
        counts = [[of[sample] for sample in samples] for of in (mine.seen, mine.gist_rows)]
        same = cuts is None or tuple(cuts) == self.cuts()
        if not (same and known) or wanted != found or counts != [state.seen.tolist(), state.gist_rows.tolist()]:
            raise ValueError(
                "the raw rows are not of the context that this cache holds, cut and read as it was: pass those that "
                "were kept in the same call of compress"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write them to a safetensors file of their own, replacing it in one step (`GistCache.save` leaves them out).

        ``GistCache.load(..., raw=path)`` reads them.
        """
        origin, segments, index = self.origin, self.segments, self._index
        numbers: Sequence[int] = range(len(segments))
        if self._samples is not None:  # samples were picked: theirs, in that order
            samples = self.samples()
            own = [(sample, number) for sample, of in enumerate(samples) for number in self.of_sample(of)]
            numbers = [number for _, number in own]
            segments = [replace(self.segments[number], sample=sample) for sample, number in own]
            origin = replace(
                origin,
                contexts=tuple(origin.contexts[of] for of in samples),
                seen=tuple(origin.seen[of] for of in samples),
                gist_rows=tuple(origin.gist_rows[of] for of in samples),
            )
            if index is not None:
                index = torch.cat([index[:, number * origin.gists :][:, : origin.gists] for number in numbers], 1)
        with raw_file.writing(path, origin, segments) as file:
            for number in numbers:
                file.add(self.rows(number), None if index is None else index.shape)
            file.finish(index)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RawSegments:
        """Those of a file: rows are read when they are asked for, and checked then. ValueError where it is torn."""
        return cls(*raw_file.load(path))


@dataclass(frozen=True)
class _Piece:
    """A segment within a call: its row of the batch, and the columns of its raw rows and of its gists."""

    sample: int
    rows: slice
    gists: np.ndarray


class Recording:
    """Takes the raw rows of the calls of one compression, layer by layer.

    Parameters
    ----------
    calls : list of Call
        On the host.
    origin : RawOrigin
    layers : int
        Of the model.
    dtype : torch.dtype, optional
        int8 or float8_e4m3fn: what rows are quantized to, on the device, before they are copied.
    apart : bool
        Whether the cache drops the gists of segments (hierarchical models): their keys are kept here then.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        origin: RawOrigin,
        layers: int,
        dtype: torch.dtype | None,
        apart: bool,
    ) -> None:
        check_gist_dtype(dtype, origin.dtype)
        self._origin, self._layers, self._apart = origin, layers, apart
        self._dtype = None if dtype == origin.dtype else dtype
        self.segments: list[RawSegment] = []
        before = [0] * len(origin.seen)  # gist rows of each sample
        self._pieces = []
        for call in calls:
            self._pieces.append(self._of_call(call, before))
            before = call.plan.after.gist_rows.tolist()
        self._call, self._first = 0, 0
        self._now: list[KeyValueRows] = []
        self._held: list[KeyValueRows] = []
        self._index: torch.Tensor | None = None

    def _of_call(self, call: Call, before: list[int]) -> list[_Piece]:
        plan, found = call.plan, []
        layout: Any = plan.layout
        real: Any = plan.real
        place: Any = plan.position_ids
        for sample in range(len(real)):
            columns = np.flatnonzero(real[sample])
            is_gist, begins = layout.is_gist[sample], layout.local_begin[sample][columns]
            if is_gist[columns].all():  # it has ended before, or this is a summary, whose tokens are all gists
                continue
            for begin in np.unique(begins):
                own = columns[begins == begin]
                raw = own[~is_gist[own]]
                kept = raw[~np.isin(raw, layout.gather[sample])]  # a sink's row is compact already
                rows = slice(int(raw[-1]) + 1 - len(kept), int(raw[-1]) + 1)
                ids, positions = (np.array(t[sample][raw], dtype=np.int64) for t in (call.words, place))
                gists = own[is_gist[own]]
                gist_row = before[sample] + int(np.flatnonzero(layout.gather[sample] == gists[0])[0])
                self.segments.append(RawSegment(sample, ids, positions, len(kept), gist_row))
                found.append(_Piece(sample, rows, gists))
        return found

    def take(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any) -> None:
        """A layer's rows ``[B, Hkv, N, D]`` of the call under way, of which the raw ones are copied to the host."""
        pieces = self._pieces[self._call]
        if not pieces:
            return
        given = KeyValueRows(k, v) if self._dtype is None else quantize_rows(KeyValueRows(k, v), self._dtype)
        rows = given.map(torch.Tensor.cpu)
        heads, dim = k.shape[1], k.shape[3]
        if not layer:
            sizes = [piece.rows.stop - piece.rows.start for piece in pieces]
            self._now = [_empty(self._layers, size, heads, dim, rows.key.dtype) for size in sizes]
        for piece, mine in zip(pieces, self._now, strict=True):
            for held, new in zip(mine.tensors(), rows.tensors(), strict=True):
                copyable(held)[layer].copy_(copyable(new)[piece.sample, :, piece.rows].transpose(0, 1))
        if self._apart:
            if self._index is None:
                shape = (self._layers, len(self.segments) * self._origin.gists, heads, dim)
                self._index = torch.empty(shape, dtype=self._origin.dtype)
            keys = k.cpu() if self._dtype is not None else rows.key
            for number, piece in enumerate(pieces, self._first):
                place = slice(number * self._origin.gists, (number + 1) * self._origin.gists)
                self._index[layer, place] = keys[piece.sample][:, torch.from_numpy(piece.gists)].transpose(0, 1)

    def end_call(self, file: raw_file.Writer | None) -> None:
        """The call is through all layers: `file` takes its rows, without one they stay in memory."""
        if file is None:
            self._held += self._now
        else:
            for rows in self._now:
                file.add(rows, None if self._index is None else self._index.shape)
        self._now = []
        self._first += len(self._pieces[self._call])
        self._call += 1

    def finish(self, file: raw_file.Writer | None) -> RawSegments:
        """The rows of all calls, in memory or in the file."""
        rows = self._held if file is None else file.finish(self._index)
        return RawSegments(self._origin, self.segments, rows, self._index)


def _empty(layers: int, rows: int, heads: int, dim: int, dtype: torch.dtype) -> KeyValueRows:
    found = KeyValueRows.empty(layers * rows, kv_heads=heads, head_dim=dim, dtype=dtype)
    return found.map(lambda t: t.view(layers, rows, *t.shape[1:]))


def copyable(rows: torch.Tensor) -> torch.Tensor:
    """Float8 elements as bytes, which every version of torch copies."""
    return rows.view(torch.int8) if rows.dtype == torch.float8_e4m3fn else rows
