"""One file of a store: a chunk's documents, their names and checksums, as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gistkern.corpus.plan import Document
from gistkern.corpus.rows import CompressedDocument

__all__ = ["FORMAT", "SETTINGS", "Shard", "replace_file", "shard_path", "write_shard"]

FORMAT = "gistkern-corpus-2"
SETTINGS = "corpus.json"


def shard_path(folder: Path, chunk: int) -> Path:
    """The file of a chunk."""
    return folder / f"chunk-{chunk:08d}.safetensors"


def write_shard(
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
        "sha256": [_checksum(one) for one in compressed],
    }
    tensors = {
        "rows": torch.cat([one.rows for one in compressed]),
        "offsets": lengths.cumsum(0),
        "numbers": numbers,
    }
    temporary = path.with_suffix(".tmp")
    text = json.dumps(header)
    # one entry: safetensors writes several in any order, and the same documents must be the same bytes
    entry = f"{_header_checksum(text, tensors['offsets'], numbers)} {text}"
    save_file(tensors, temporary, metadata={FORMAT: entry})
    replace_file(temporary, path)


def replace_file(temporary: Path, path: Path) -> None:
    """Put a written file in its place; both the bytes and the name are on disk when this returns."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # safetensors writes private files
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _header_checksum(text: str, offsets: torch.Tensor, numbers: torch.Tensor) -> str:
    """Of everything but the rows, which have checksums of their own."""
    digest = hashlib.sha256(text.encode())
    for tensor in (offsets, numbers):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksum(document: CompressedDocument) -> str:
    digest = hashlib.sha256(f"{document.seen} {document.tail_position} {tuple(document.rows.shape)}".encode())
    digest.update(document.rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Shard:
    """A file of a store, memory-mapped: opening reads its header, `read` one document's rows.

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
        If the file is torn or damaged, or another store's or chunk's; naming the file, and from `read` the document.
    """

    path: Path
    chunk: int
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        try:
            self._file = safe_open(self.path, "pt").__enter__()
            entry = (self._file.metadata() or {}).get(FORMAT)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is torn or no safetensors file ({error})") from error
        if entry is None:
            raise ValueError(f"{self.path} is no file of a {FORMAT} store")
        checksum, _, text = entry.partition(" ")
        offsets, numbers = self._file.get_tensor("offsets"), self._file.get_tensor("numbers")
        if checksum != _header_checksum(text, offsets, numbers):
            raise ValueError(f"{self.path} is damaged: the checksum of its header does not match")
        self.header: dict[str, Any] = json.loads(text)
        found = self.header["settings"]
        if different := [name for name, value in self.settings.items() if found.get(name) != value]:
            said = ", ".join(f"{name} {found.get(name)!r}, not {self.settings[name]!r}" for name in different)
            raise ValueError(f"{self.path} is another store's: made with {said}")
        if self.header["chunk"] != self.chunk:
            raise ValueError(f"{self.path} holds chunk {self.header['chunk']}: it was renamed")
        self.names: list[str] = self.header["names"]
        self._offsets, self._numbers = offsets.tolist(), numbers.tolist()

    def read(self, place: int) -> CompressedDocument:
        """The document at a place, checked."""
        begin, end = self._offsets[place : place + 2]
        document = CompressedDocument(self._file.get_slice("rows")[begin:end], *self._numbers[place])
        if _checksum(document) != self.header["sha256"][place]:
            raise ValueError(
                f"document {self.names[place]!r} in {self.path} is damaged: its checksum does not match. "
                "Delete the file and compress the corpus again: only this chunk is redone"
            )
        return document
