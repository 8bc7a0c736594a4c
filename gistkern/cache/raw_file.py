"""Raw rows in a safetensors file: written segment by segment while a context is compressed, read one at a time.

Where each tensor stands follows from the number of raw tokens of each segment, so the header has its place in front
before the first row is written, though its checksums are known last. A reader takes the bytes of the segments it wants
and no others. They are read, not mapped: a file that somebody cuts while it is mapped ends the process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gistkern.files import UnreadableError, field_of, parse_json, replacing
from gistkern.rows import LARGEST, KeyValueRows

__all__ = ["RawOrigin", "RawSegment", "RowsInFile", "Writer", "load", "writing"]

_FORMAT = "gistkern-raw-1"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}
_SPELLED = {dtype: name for name, dtype in _DTYPES.items()}
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class RawSegment:
    """A segment: its sample, ids and positions of its raw tokens (int64 ``[tokens]``), and how many rows are kept.

    Those are of its last tokens: in front of them are attention sinks. `gist_row` is where the rows of its gists began
    among the sample's.
    """

    sample: int
    ids: np.ndarray
    positions: np.ndarray
    rows: int
    gist_row: int


@dataclass(frozen=True)
class RawOrigin:
    """What was compressed, by whom, and how: of each sample the context's digest, tokens read and gist rows.

    `dtype` is what the model computes in, `gists` how many gist tokens end a segment.
    """

    positions: str
    fingerprint: str | None
    contexts: tuple[str, ...]
    seen: tuple[int, ...]
    gist_rows: tuple[int, ...]
    dtype: torch.dtype
    gists: int


@dataclass(frozen=True)
class _Shape:
    """What the rows of all segments share; `index` is whether keys of the segments' own gists are kept too."""

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    index: bool


def _tensors(table: np.ndarray, gists: int, of: _Shape, wide: torch.dtype) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Type and shape of each tensor, in their order in the file. `table` is int64 ``[segments, 4]``:
    a segment's sample, tokens, rows and `gist_row`."""
    tokens = int(table[:, 1].sum())
    found: dict[str, tuple[torch.dtype, list[int]]] = {
        "segments": (torch.int64, list(table.shape)),
        "ids": (torch.int64, [tokens]),
        "positions": (torch.int64, [tokens]),
    }
    if of.index:
        found["index"] = wide, [of.layers, len(table) * gists, of.heads, of.dim]
    for number, rows in enumerate(table[:, 2].tolist()):
        shape = [of.layers, rows, of.heads, of.dim]
        found[f"{number}.key"] = found[f"{number}.value"] = of.dtype, shape
        if of.dtype in LARGEST:
            found[f"{number}.key_scale"] = found[f"{number}.value_scale"] = torch.float32, shape[:3]
    return found


def _places(tensors: dict[str, tuple[torch.dtype, list[int]]]) -> dict[str, dict[str, Any]]:
    """The tensors as safetensors' header lists them."""
    found, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        found[name] = {"dtype": _SPELLED[dtype], "shape": shape, "data_offsets": [begin, end]}
    return found


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class Writer:
    """Writes the rows of segments in their order.

    Parameters
    ----------
    file : binary file
        Empty.
    path : Path
        What it will be called.
    origin, segments
        Known before the first rows are; the list of segments is looked at then.
    """

    def __init__(self, file: BinaryIO, path: Path, origin: RawOrigin, segments: Sequence[RawSegment]) -> None:
        self._file, self._path, self._origin, self._segments = file, path, origin, segments
        self._digests: list[str] = []
        self._places: dict[str, dict[str, Any]] = {}
        self._shape: _Shape | None = None

    def _small(self) -> dict[str, torch.Tensor]:
        """The tensors that every reader needs."""
        table = [(one.sample, len(one.ids), one.rows, one.gist_row) for one in self._segments]
        ids, positions = (
            np.concatenate([getattr(one, name) for one in self._segments]) for name in ("ids", "positions")
        )
        return {
            "segments": torch.tensor(table),
            "ids": torch.from_numpy(ids),
            "positions": torch.from_numpy(positions),
        }

    def _header(self, digests: list[str], digest: str) -> bytes:
        assert self._shape is not None
        about = {**_about(self._origin, self._shape, len(self._segments)), "rows": digests, "sha256": digest}
        text = json.dumps({"__metadata__": {"gistkern": json.dumps(about)}, **self._places}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def add(self, rows: KeyValueRows, index: Sequence[int] | None) -> None:
        """Rows ``[layers, rows, Hkv, D]`` of the next segment; `index` is the shape that `finish` gets."""
        if self._shape is None:
            layers, _, heads, dim = rows.key.shape
            self._shape = _Shape(layers, heads, dim, rows.key.dtype, index is not None)
            table = self._small()["segments"].numpy()
            self._places = _places(_tensors(table, self._origin.gists, self._shape, self._origin.dtype))
            begin = self._places["0.key"]["data_offsets"][0]
            count = len(self._segments)
            self._file.seek(len(self._header([_NO_DIGEST] * count, _NO_DIGEST)) + begin)
        digest = hashlib.sha256()
        for tensor in rows.tensors():
            digest.update(_bytes_of(tensor))
            self._file.write(_bytes_of(tensor))
        self._digests.append(digest.hexdigest())

    def finish(self, index: torch.Tensor | None) -> RowsInFile:
        """Header and small tensors, in front of the rows. Returns those: what another writes to `path` is not them."""
        assert self._shape is not None
        assert len(self._digests) == len(self._segments)
        small = self._small() | ({} if index is None else {"index": index})
        about = {**_about(self._origin, self._shape, len(self._segments)), "rows": self._digests}
        self._file.seek(0)
        header = self._header(self._digests, _digest(about, list(small.values())))
        self._file.write(header)
        for tensor in small.values():
            self._file.write(_bytes_of(tensor))
        return RowsInFile(self._path, len(header), self._places, self._digests)


@contextmanager
def writing(path: str | os.PathLike, origin: RawOrigin, segments: Sequence[RawSegment]) -> Iterator[Writer]:
    """A writer, whose file takes its name at the end of the block; a block that fails leaves what was there."""
    with replacing(path) as draft, draft.open("wb") as file:
        yield Writer(file, Path(path).absolute(), origin, segments)


def _about(origin: RawOrigin, shape: _Shape, segments: int) -> dict[str, Any]:
    """The fields of the header, but for the checksums."""
    held = {**vars(origin), **vars(shape), "dtype": _SPELLED[origin.dtype], "rows_dtype": _SPELLED[shape.dtype]}
    lists = {name: list(held[name]) for name in ("contexts", "seen", "gist_rows")}
    return {"format": _FORMAT, **held, **lists, "segments": segments}


def _digest(about: dict[str, Any], small: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in small:
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


class RowsInFile:
    """The rows of each segment, read and checked when they are asked for."""

    def __init__(self, path: Path, begin: int, places: dict[str, Any], digests: Sequence[str]) -> None:
        self.path, self._begin, self._places, self._digests = path, begin, places, digests

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        begins = [place["data_offsets"] for name, place in self._places.items() if name[0].isdigit()]
        return sum(end - begin for begin, end in begins)

    def __getitem__(self, number: int) -> KeyValueRows:
        names = [f"{number}.{part}" for part in ("key", "value", "key_scale", "value_scale")]
        places = [self._places[name] for name in names if name in self._places]
        found = [torch.empty(place["shape"], dtype=_DTYPES[place["dtype"]]) for place in places]
        digest = hashlib.sha256()
        with _opened(self.path) as file:
            file.seek(self._begin + places[0]["data_offsets"][0])
            whole = True
            for room in map(_bytes_of, found):  # into the tensors themselves: a segment is large
                whole &= file.readinto(room) == len(room)  # type: ignore[attr-defined]
                digest.update(room)
        if not whole or digest.hexdigest() != self._digests[number]:
            raise ValueError(
                f"{self.path} is damaged: the raw rows of segment {number} are not those that were written; compress "
                "the context again, or ask its gist rows alone"
            )
        return KeyValueRows(*found)


def _opened(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise OSError(errno.EINVAL, "it is no regular file")  # a pipe has no end to wait for
        return path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, "the file with the raw rows is gone: compress again, or ask the gist rows alone", str(path)
        ) from error
    except OSError as error:
        raise UnreadableError(path, error) from error


def _tensor(content: bytearray, place: dict[str, Any]) -> torch.Tensor:
    first, last = place["data_offsets"]
    dtype, shape = _DTYPES[place["dtype"]], place["shape"]
    if first == last:
        return torch.empty(shape, dtype=dtype)
    # a copy, which stands where the type may
    return torch.frombuffer(bytearray(content[first:last]), dtype=dtype).view(shape)


def load(path: str | os.PathLike) -> tuple[RawOrigin, list[RawSegment], RowsInFile, torch.Tensor | None]:
    """What a file says of its rows, and the rows, still in it. ValueError if it is torn, foreign or makes no sense."""
    path = Path(path).absolute()  # rows are read later, perhaps from elsewhere
    torn = f"{path} is torn or holds no raw rows"
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{torn}: compress the context again")
        found = parse_json(file.read(length), torn)
        about = parse_json((found.pop("__metadata__", None) or {}).get("gistkern", "{}"), torn)
        if about.get("format") != _FORMAT:
            raise ValueError(
                f"{path} holds no raw rows of format {_FORMAT!r} (found {reprlib.repr(about.get('format'))})"
            )
        digest, begin = about.pop("sha256", None), 8 + length
        count = field_of(about, "segments", int, torn)
        room = size - begin
        if not 0 < count * 32 <= room:
            raise ValueError(f"{torn}: it is shorter than it says")
        table = np.frombuffer(file.read(count * 32), dtype=np.int64).reshape(count, 4)
        try:
            origin, shape = _parsed(about, table)
            places = _places(_tensors(table, origin.gists, shape, origin.dtype))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{torn}: {error}") from error
        whole = max(place["data_offsets"][1] for place in places.values())
        if found != places or whole != room or len(about["rows"]) != count:
            raise ValueError(f"{torn}: its tensors are not those of its {count} segments")
        file.seek(begin)
        small = bytearray(file.read(places["0.key"]["data_offsets"][0]))
    tensors = {name: _tensor(small, places[name]) for name in places if not name[0].isdigit()}
    if digest != _digest(about, list(tensors.values())):
        raise ValueError(f"{path} is damaged: its checksum does not match; compress the context again")
    cuts = np.cumsum(table[:, 1])[:-1]
    ids, positions = (np.split(tensors[name].numpy(), cuts) for name in ("ids", "positions"))
    segments = [
        RawSegment(sample, own, place, rows, gist_row)
        for (sample, _, rows, gist_row), own, place in zip(table.tolist(), ids, positions, strict=True)
    ]
    return origin, segments, RowsInFile(path, begin, places, about["rows"]), tensors.get("index")


def _parsed(about: dict[str, Any], table: np.ndarray) -> tuple[RawOrigin, _Shape]:
    """Origin and shape of a header; ValueError, TypeError or KeyError for what makes no sense."""
    numbers = [about[name] for name in ("layers", "heads", "dim", "gists")]
    if not all(type(number) is int and 0 < number < 2**31 for number in numbers) or type(about["index"]) is not bool:
        raise ValueError(f"layers, heads, dim and gists must be positive, found {numbers}")
    contexts, seen, gist_rows = (tuple(about[name]) for name in ("contexts", "seen", "gist_rows"))
    if not len(contexts) == len(seen) == len(gist_rows) > 0:
        raise ValueError("contexts, seen and gist_rows must have a number for each sample")
    sample, tokens, rows, gist_row = table.T
    known = (sample >= 0) & (sample < len(seen)) & (rows >= 0) & (rows <= tokens) & (tokens > 0) & (tokens < 2**31)
    known &= (gist_row >= 0) & (gist_row < 2**31)
    if not known.all():
        raise ValueError("segments must have a sample, and as many rows as tokens at most")
    named = about["positions"], about["fingerprint"], contexts, seen, gist_rows, _DTYPES[about["dtype"]], about["gists"]
    layers, heads, dim, _ = numbers
    return RawOrigin(*named), _Shape(layers, heads, dim, _DTYPES[about["rows_dtype"]], about["index"])
