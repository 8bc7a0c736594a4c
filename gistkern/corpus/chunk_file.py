"""One file of a store: a chunk's documents, their names and checksums, as safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gistkern.cache.file import finite
from gistkern.cache.tokens_read import ContextRead
from gistkern.corpus.plan import Document
from gistkern.corpus.rows import CompressedDocument, bytes_of
from gistkern.corpus.tensor_file import TensorFile
from gistkern.files import field_of, parse_json, replacing

__all__ = ["ABOUT", "FORMAT", "SETTINGS", "ChunkFile", "chunk_path", "write_chunk"]

FORMAT = "gistkern-corpus-3"
SETTINGS = "corpus.json"
ABOUT = (
    "gistkern",
    "model",
    "adapter",
    "dtype",
    "bits",
)  # fields of it that say by what a store was made, and are not compared
_MOST = 2**31 - 1  # positions are int32 in a layout


def chunk_path(folder: Path, chunk: int) -> Path:
    """The file of a chunk."""
    return folder / f"chunk-{chunk:08d}.safetensors"


def write_chunk(
    path: Path,
    chunk: int,
    documents: Sequence[Document],
    compressed: Sequence[CompressedDocument],
    settings: Mapping[str, Any],
) -> None:
    """Write a chunk's file in one step."""
    lengths = torch.tensor([0, *(len(one.rows) for one in compressed)])
    numbers = torch.tensor([[one.seen, one.tail_position] for one in compressed])
    header = {
        "settings": dict(settings),
        "chunk": chunk,
        "names": [one.name for one in documents],
        "documents": [one.digest for one in documents],
        "contexts": [str(ContextRead.of(torch.tensor(one.ids))) for one in documents],
        "sha256": [_checksum(one) for one in compressed],
    }
    tensors = {
        "rows": torch.cat([one.rows for one in compressed]),
        "offsets": lengths.cumsum(0),
        "numbers": numbers,
    }
    text = json.dumps(header)
    # one entry: safetensors writes several in any order, and the same documents must be the same bytes
    entry = f"{_header_checksum(text, tensors['offsets'], numbers)} {text}"
    with replacing(path) as draft:
        save_file(tensors, draft, metadata={FORMAT: entry})


def _header_checksum(text: str, offsets: torch.Tensor, numbers: torch.Tensor) -> str:
    """Of everything but the rows, which have checksums of their own."""
    digest = hashlib.sha256(text.encode())
    for tensor in (offsets, numbers):
        digest.update(bytes_of(tensor).data)
    return digest.hexdigest()


def _checksum(document: CompressedDocument) -> str:
    digest = hashlib.sha256(f"{document.seen} {document.tail_position} {tuple(document.rows.shape)}".encode())
    digest.update(bytes_of(document.rows).data)
    return digest.hexdigest()


@dataclass
class ChunkFile:
    """An open file of a store: opening reads its header, `read` one document's rows.

    Parameters
    ----------
    path : Path
        The file.
    chunk : int
        Which one of its store it must be.
    settings : mapping
        How the store's files were made (`SETTINGS`).

    Raises
    ------
    ValueError
        If the file cannot be read, is torn or damaged, or another store's or chunk's, or holds what no store holds;
        naming the file and the field, and from `read` the document.
    """

    path: Path
    chunk: int
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._file = TensorFile(self.path)
        entry = self._file.metadata.get(FORMAT)
        if not isinstance(entry, str):
            raise ValueError(f"{self.path} is no file of a {FORMAT} store")
        self._file.require({"rows", "offsets", "numbers"})
        checksum, _, text = entry.partition(" ")
        offsets, numbers = self._file.tensor("offsets"), self._file.tensor("numbers")
        if checksum != _header_checksum(text, offsets, numbers):
            raise ValueError(f"{self.path} is damaged: the checksum of its header does not match")
        where = f"{self.path} was not written by compress_corpus"
        self.header = parse_json(text, where)
        found = field_of(self.header, "settings", dict, where)
        if different := [name for name, value in self.settings.items() if found.get(name) != value]:
            said = ", ".join(f"{name} {found.get(name)!r}, not {self.settings[name]!r}" for name in different)
            raise ValueError(f"{self.path} is another store's: made with {said}")
        if field_of(self.header, "chunk", int, where) != self.chunk:
            raise ValueError(f"{self.path} holds chunk {self.header['chunk']}: it was renamed")
        self.names = self._strings("names", where)
        self.digests, self._checksums = self._strings("documents", where), self._strings("sha256", where)
        try:
            self._contexts = [ContextRead.parse(one) for one in self._strings("contexts", where)]
        except ValueError as error:
            raise ValueError(f"{where}: of its contexts {error}") from error
        self._offsets, self._numbers = self._counts(offsets, numbers, where)

    def _strings(self, field: str, where: str) -> list[str]:
        found: list[str] = field_of(self.header, field, list, where)
        if wrong := [one for one in found if type(one) is not str or not one]:
            raise ValueError(f"{where}: {field} must be strings, found {reprlib.repr(wrong[0])}")
        count = len(self.header["names"])
        if len(found) != count:
            raise ValueError(f"{where}: {field} must be {count}, found {len(found)}")
        if field == "names" and len(set(found)) != count:
            raise ValueError(f"{where}: names holds {_doubled(found)!r} twice")
        return found

    def _counts(
        self, offsets: torch.Tensor, numbers: torch.Tensor, where: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        count, shape = len(self.names), self._file.shapes["rows"]
        if len(shape) != 5 or shape[2] != 2 or not all(shape[1:]):
            raise ValueError(f"{where}: rows must be [R, layers, 2, Hkv, D], found {shape}")
        if not self._file.dtypes["rows"].is_floating_point:
            raise ValueError(f"{where}: rows must be floats, found {self._file.dtypes['rows']}")
        for name, tensor, wanted in (("offsets", offsets, (count + 1,)), ("numbers", numbers, (count, 2))):
            if tensor.shape != wanted or tensor.dtype != torch.int64:
                raise ValueError(f"{where}: {name} must be int64 of shape {wanted}, found {tuple(tensor.shape)}")
        found = offsets.tolist()
        if found[0] != 0 or found[-1] != shape[0] or found != sorted(found):
            raise ValueError(f"{where}: offsets must rise from 0 to the {shape[0]} rows, found {reprlib.repr(found)}")
        pairs = [(seen, position) for seen, position in numbers.tolist()]
        if wrong := [pair for pair in pairs if not (0 < pair[0] <= _MOST and 0 <= pair[1] <= _MOST)]:
            raise ValueError(f"{where}: numbers must be between 0 and {_MOST}, found {wrong[0]}")
        return found, pairs

    def totals(self) -> tuple[int, int, int, int]:
        """Documents, their tokens, their rows, and the bytes of those."""
        _, *shape = self._file.shapes["rows"]
        rows = self._offsets[-1]
        size = math.prod(shape) * self._file.dtypes["rows"].itemsize
        return len(self.names), sum(one.tokens for one in self._contexts), rows, rows * size

    def read(self, place: int) -> CompressedDocument:
        """The document at a place, checked."""
        begin, end = self._offsets[place : place + 2]
        document = CompressedDocument(self._file.rows("rows", begin, end), *self._numbers[place], self._contexts[place])
        what = f"document {self.names[place]!r} in {self.path}"
        if _checksum(document) != self._checksums[place]:
            raise ValueError(
                f"{what} is damaged: its checksum does not match. "
                "Delete the file and compress the corpus again: only this chunk is redone"
            )
        if not finite(document.rows):
            raise ValueError(f"{what} holds inf or NaN: compress it in bfloat16 or float32")
        return document


def _doubled(names: Sequence[str]) -> str:
    known: set[str] = set()
    return next(name for name in names if name in known or known.add(name))  # type: ignore[func-returns-value]
