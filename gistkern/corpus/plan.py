"""Which documents are compressed together: the same batches however often a run is started again, by however many.

Documents are taken in chunks of consecutive ones; a chunk is one file of the store, and one process's. Within a chunk
batches hold consecutive documents too, which the model reads one behind the other. So what a batch computes, bit for
bit, follows from the documents and the settings alone.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Document", "DocumentError", "Documents", "batches_of", "chunks_of", "read_chunk"]

Content: TypeAlias = "str | Sequence[int]"
Documents: TypeAlias = "Mapping[str, Content] | Iterable[Content | tuple[str, Content]]"


class DocumentError(ValueError):
    """What is wrong with the document called `name`."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Document:
    """A document's name and token ids."""

    name: str
    ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Of the ids: a document that has changed is another one."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()[:16]


def _checked(documents: Documents) -> Iterator[tuple[str, Content]]:
    if isinstance(documents, str | bytes | bytearray | os.PathLike):
        raise ValueError(
            f"documents is a single {type(documents).__name__}: pass texts or ids, by name or in a list (a file or "
            "a folder of documents is read by the command gistkern compress)"
        )
    if isinstance(documents, set | frozenset):
        raise ValueError("documents is a set, which has another order in every process: pass a list")
    if not isinstance(documents, Iterable):
        raise ValueError(f"documents must be a mapping or iterable, got {type(documents).__name__}")
    known: set[bytes] = set()
    for name, content in (
        documents.items() if isinstance(documents, Mapping) else map(_named, itertools.count(), documents)
    ):
        name = _checked_name(name)
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()  # millions of long names take no room
        if digest in known:
            raise DocumentError(name, f"two documents are called {name!r}: names must differ")
        known.add(digest)
        yield name, _checked_content(name, content)


def _named(number: int, document: Any) -> tuple[Any, Any]:
    if isinstance(document, tuple) and len(document) == 2 and isinstance(document[0], str):
        return document
    return str(number), document


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise DocumentError(str(name), f"names of documents must be strings that say something, got {name!r}")
    if (place := _half_pair(name)) is not None:
        raise DocumentError(
            name, f"the name {name!r} cannot be written as UTF-8 (character {place} is half a pair): choose another"
        )
    return str(name)


def _checked_content(name: str, content: Any) -> Content:
    if isinstance(content, str):
        if (place := _half_pair(content)) is not None:
            raise DocumentError(
                name,
                f"document {name!r} cannot be written as UTF-8 (character {place} is half a pair, "
                f"{content[place]!r}): decode it with errors='replace'",
            )
    else:
        if hasattr(content, "tolist"):  # tensors and arrays
            content = content.tolist()
        if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
            said = "None" if content is None else type(content).__name__
            raise DocumentError(name, f"document {name!r} is a {said}: pass a text or a list of token ids")
        for one in content if set(map(type, content)) - {int} else ():
            if isinstance(one, bool) or not _is_whole(one):
                raise DocumentError(name, f"document {name!r} holds {reprlib.repr(one)} where token ids are expected")
    if not len(content.strip() if isinstance(content, str) else content):
        raise DocumentError(name, f"document {name!r} is empty: leave it out")
    return content


def _is_whole(number: Any) -> bool:
    try:
        operator.index(number)
    except TypeError:
        return False
    return True


def _half_pair(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def chunks_of(documents: Documents, size: int, length: int) -> Iterator[list[tuple[str, Content]]]:
    """Lists of consecutive names and contents; documents without a name are called by their number.

    A chunk holds at most `size` documents, of at most `length` characters (texts) and tokens (ids) together; a longer
    document stands alone. Lengths as they are given are known to every process without encoding all texts.

    Raises
    ------
    DocumentError
        If a name is no text, empty, or comes twice, or a content is no text or ids, or is empty.
    ValueError
        If `documents` is a path, or has no order that is the same in every process.
    """
    chunk: list[tuple[str, Content]] = []
    filled = 0
    for pair in _checked(documents):
        if chunk and (len(chunk) == size or filled + len(pair[1]) > length):
            yield chunk
            chunk, filled = [], 0
        chunk.append(pair)
        filled += len(pair[1])
    if chunk:
        yield chunk


def read_chunk(
    chunk: Sequence[tuple[str, Content]], encode: Callable[[str], Sequence[int]] | None, vocabulary: int
) -> list[Document]:
    """The documents of a chunk as ids, which lie below `vocabulary`: the words of the model, no gist tokens.

    Raises
    ------
    DocumentError
        If a text comes without a tokenizer, or a document has no ids, or others than those.
    """
    found = []
    for name, content in chunk:
        if isinstance(content, str):
            if encode is None:
                raise DocumentError(name, f"document {name!r} is a text: pass a tokenizer, or token ids")
            try:
                content = encode(content)
            except ValueError as error:
                raise DocumentError(name, f"document {name!r} cannot be tokenised: {error}") from error
        ids = tuple(int(one) for one in content)
        if not ids:
            raise DocumentError(name, f"document {name!r} is empty: leave it out")
        if wrong := [one for one in ids if not 0 <= one < vocabulary]:
            raise DocumentError(
                name,
                f"document {name!r} holds token {reprlib.repr(wrong[0])}, the model's words are 0 to {vocabulary - 1}: "
                "gist tokens are appended by themselves, and a tokenizer must be the model's",
            )
        found.append(Document(name, ids))
    return found


def batches_of(documents: Sequence[Document], batch_tokens: int) -> list[list[int]]:
    """Places of consecutive documents in batches of at most `batch_tokens` tokens; a longer one stands alone."""
    batches: list[list[int]] = []
    filled = 0
    for place, document in enumerate(documents):
        filled += len(document.ids)
        if not batches or filled > batch_tokens:
            batches.append([])
            filled = len(document.ids)
        batches[-1].append(place)
    return batches
