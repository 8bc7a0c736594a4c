"""`GistStore`: compressed documents by name, read when they are asked for."""

from __future__ import annotations

import functools
import os
import reprlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gistkern.cache.cache import GistCache
from gistkern.cache.file import check_device
from gistkern.corpus.chunk_file import ABOUT, FORMAT, SETTINGS, ChunkFile, chunk_path
from gistkern.corpus.index import hash_of, read_index
from gistkern.corpus.rows import CompressedDocument, to_cache
from gistkern.files import parse_json, read_bytes
from gistkern.hf.chat import ROLES
from gistkern.layout.positions import SCHEMES

__all__ = ["GistStore"]

_OPEN_FILES = 64


class Totals(NamedTuple):
    """Of a store: documents, tokens that were compressed (as often as they stand in them), rows that stay, bytes."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        ratio = self.tokens / max(1, self.rows)
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens in {self.rows:,} rows ({ratio:,.1f}x), "
            f"{self.nbytes:,} bytes"
        )


class GistStore:
    """Compressed documents in a folder that `gistkern.compress_corpus` wrote.

    Opening reads the index only, or where there is none (a corpus still in work) the headers of the files that are
    there; documents are read and checked one by one. Threads and forked children may share a store, and a pickled one
    opens its folder again (workers of a DataLoader).

    Parameters
    ----------
    folder : path
        Of the store.
    device : torch.device or str
        Where caches are wanted.

    Attributes
    ----------
    about : dict of str to str
        By what it was made: `gistkern` (the version), `model`, `dtype`, `bits` if it was quantized, and `adapter` if
        there was one (empty if it was not loaded by `gistkern.load`).
    damaged : list of str
        What is wrong with files that could not be opened without an index; the rest is there.

    Raises
    ------
    ValueError
        If the folder holds no store, one name twice, or the device cannot be used.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> documents = {"one": "The bell is with Mira.", "two": "The lamp is with Jonas."}
    >>> _ = gistkern.compress_corpus(model, documents, "corpus", tokenizer, progress=False)
    >>> store = gistkern.GistStore("corpus")
    >>> list(store), "three" in store
    (['one', 'two'], False)
    >>> store["one"].gist_rows
    tensor([3])
    >>> store.batch(["one", "two", "one"], shared=True).batch_size  # the first and the last sample read the same rows
    3
    """

    def __init__(self, folder: str | os.PathLike, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = Path(folder).absolute(), device
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder: pass one that gistkern.compress_corpus wrote")
        check_device(device)
        self._settings, self.about = _settings(self.folder)
        # it holds no lock while it opens a file, so a child forked meanwhile does not wait for one
        self._file = functools.lru_cache(_OPEN_FILES)(self._opened)
        self.damaged: list[str] = []
        self._index = read_index(self.folder)
        self._scanned: dict[str, tuple[int, int]] = self._scan() if self._index is None else {}
        if self._index is not None:
            self._check_names(self._index)

    def __reduce__(self) -> tuple[type[GistStore], tuple[Path, torch.device | str]]:
        return type(self), (self.folder, self.device)

    def __repr__(self) -> str:
        made = self.about.get("adapter") or self.about.get("model") or "an unnamed model"
        return f"GistStore({str(self.folder)!r}, {len(self):,} documents by {made})"

    @property
    def role(self) -> str | None:
        """The chat role in which its texts stand, which questions have to follow; None without a chat template."""
        return self._settings.get("chat")

    def totals(self) -> Totals:
        """Counts of documents, tokens, rows and bytes, from the headers of its files; ValueError if one is damaged."""
        chunks = (
            {chunk for chunk, _ in self._scanned.values()}
            if self._index is None
            else set(self._index["chunks"].tolist())
        )
        return Totals(*map(sum, zip(*(self._file(chunk).totals() for chunk in sorted(chunks)), strict=True)))

    def __len__(self) -> int:
        return len(self._scanned) if self._index is None else len(self._index["hashes"])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the corpus; those of a damaged file are left out with a warning."""
        if self._index is None:
            yield from self._scanned
            return
        for chunk in np.unique(self._index["chunks"]).tolist():
            try:
                names = self._file(chunk).names
            except ValueError as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
                continue
            yield from names

    def __getitem__(self, name: str) -> GistCache:
        """One document's cache; KeyError if there is none of that name, ValueError if it is damaged."""
        return self.batch([name])

    def batch(self, names: Iterable[str], shared: bool = False) -> GistCache:
        """A ragged batch of documents, in that order; a name may come several times.

        Parameters
        ----------
        names : iterable of str
            One per sample.
        shared : bool
            Have each document's rows once in memory, read by all samples that ask about it (`GistCache.shared`).

        Raises
        ------
        KeyError
            If a name is unknown.
        ValueError
            If one string is given instead of several, a file is torn or foreign, a document damaged, or no name is
            given; the message names file and document.

        Examples
        --------
        >>> model, tokenizer, handle = gistkern.load("runs/mine")
        >>> documents = {"one": "The bell is with Mira.", "two": "The lamp is with Jonas."}
        >>> store = gistkern.compress_corpus(model, documents, "corpus", tokenizer, progress=False)
        >>> store.batch(["two", "one"]).gist_rows
        tensor([3, 3])
        """
        if isinstance(names, str | bytes):
            raise ValueError(f"names is one string: pass [{names!r}]")
        names = list(names)
        read = {name: self._read(name) for name in dict.fromkeys(names)}
        if not read:
            raise ValueError("no names: a batch has at least one document")
        place = {name: index for index, name in enumerate(read)}
        return to_cache(
            [read[name] for name in (read if shared else names)],
            self._settings["positions"],
            self._settings["fingerprint"],
            self.device,
            asked=[place[name] for name in names] if shared else None,
        )

    def _read(self, name: str) -> CompressedDocument:
        place = self._find(name)
        if place is None:
            raise KeyError(f"no document {name!r} in {self.folder}")
        try:
            file = self._file(place[0])
        except ValueError as error:
            raise ValueError(f"document {name!r} cannot be read: {error}") from error
        return file.read(place[1])

    def _find(self, name: str) -> tuple[int, int] | None:
        """Chunk and place of a document."""
        if not isinstance(name, str):
            return None
        if self._index is None:
            return self._scanned.get(name)
        hashes, wanted = self._index["hashes"], hash_of(name)
        at = int(np.searchsorted(hashes, wanted))
        while at < len(hashes) and hashes[at] == wanted:
            chunk, place = int(self._index["chunks"][at]), int(self._index["places"][at])
            try:
                known = self._file(chunk).names
            except ValueError:
                return chunk, place  # reading it says what is wrong
            if place < len(known) and known[place] == name:
                return chunk, place
            at += 1
        return None

    def _opened(self, chunk: int) -> ChunkFile:
        return ChunkFile(chunk_path(self.folder, chunk), chunk, self._settings)

    def _check_names(self, index: dict[str, np.ndarray]) -> None:
        """Raise ValueError if one name stands at two places; files are opened only for equal hashes."""
        hashes = index["hashes"]
        known: dict[str, int] = {}
        for at in np.flatnonzero(np.isin(hashes, hashes[1:][hashes[1:] == hashes[:-1]])).tolist():
            chunk, place = int(index["chunks"][at]), int(index["places"][at])
            try:
                names = self._file(chunk).names
            except ValueError:
                continue  # reading it says what is wrong
            if place < len(names):
                self._add(known, names[place], chunk)

    def _add(self, known: dict[str, int], name: str, chunk: int) -> None:
        if name in known:
            raise ValueError(
                f"two documents of {self.folder} are called {name!r}, in chunks {known[name]} and {chunk}: compress "
                "the corpus into another folder, with names that differ"
            )
        known[name] = chunk

    def _scan(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        known: dict[str, int] = {}
        for path in sorted(self.folder.glob("chunk-*.safetensors")):
            try:
                chunk = _number(path)
                names = ChunkFile(path, chunk, self._settings).names
            except ValueError as error:
                self.damaged.append(str(error))
                warnings.warn(f"left out: {error}", stacklevel=3)
                continue
            for place, name in enumerate(names):
                self._add(known, name, chunk)
                found[name] = chunk, place
        return found


def _number(path: Path) -> int:
    """The chunk that a file's name says it is."""
    digits = path.stem.removeprefix("chunk-")
    if not digits.isdecimal() or chunk_path(path.parent, int(digits)) != path:
        raise ValueError(f"{path} is not named as a store's files are")
    return int(digits)


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """How a store was made, and by what."""
    path = folder / SETTINGS
    try:
        text = read_bytes(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} cannot be read, there is none: pass a folder that gistkern.compress_corpus wrote"
        ) from error
    found = parse_json(text, f"{path} cannot be read, it is torn")
    if found.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not of a {FORMAT} store: compress the corpus again with this version")
    for field, wanted in (("positions", SCHEMES), ("fingerprint", None)):
        value = found.get(field)
        if type(value) is not str or (wanted and value not in wanted):
            said = f"one of {list(wanted)}" if wanted else "a digest of the model"
            raise ValueError(f"{path}: {field} must be {said}, found {reprlib.repr(value)}")
    if found.get("chat") not in (None, *ROLES):
        raise ValueError(f"{path}: chat must be one of {list(ROLES)} or null, found {reprlib.repr(found['chat'])}")
    about = {name: found.pop(name) for name in ABOUT if name in found}
    if wrong := [name for name, value in about.items() if type(value) is not str]:
        raise ValueError(f"{path}: {wrong[0]} must be a string, found {reprlib.repr(about[wrong[0]])}")
    return found, about
