"""Which documents are compressed together: the same batches however often a run is started again, by however many.

Documents are taken in chunks of consecutive ones; a chunk is one file of the store, and one process's. Within a chunk
batches hold documents of about the same length. So what a batch computes, bit for bit, follows from the documents and
the settings alone.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Document", "Documents", "batches_of", "chunks_of", "read_chunk"]

Content: TypeAlias = "str | Sequence[int]"
Documents: TypeAlias = "Mapping[str, Content] | Iterable[Content | tuple[str, Content]]"


@dataclass(frozen=True)
class Document:
    """A document's name and token ids."""

    name: str
    ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Of the ids: a document that has changed is another one."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()[:16]


def chunks_of(documents: Documents, size: int, length: int) -> Iterator[list[tuple[str, Content]]]:
    """Lists of consecutive names and contents; documents without a name are called by their number.

    A chunk holds at most `size` documents, of at most `length` characters (texts) and tokens (ids) together; a longer
    document stands alone. Lengths as they are given are known to every process without encoding all texts.
    """
    pairs = iter(documents.items()) if isinstance(documents, Mapping) else map(_named, itertools.count(), documents)
    chunk: list[tuple[str, Content]] = []
    filled = 0
    for pair in pairs:
        if chunk and (len(chunk) == size or filled + len(pair[1]) > length):
            yield chunk
            chunk, filled = [], 0
        chunk.append(pair)
        filled += len(pair[1])
    if chunk:
        yield chunk


def _named(number: int, document: Any) -> tuple[str, Content]:
    if isinstance(document, tuple) and len(document) == 2 and isinstance(document[0], str):
        return document
    return str(number), document


def read_chunk(
    chunk: Sequence[tuple[str, Content]], encode: Callable[[str], Sequence[int]] | None, vocabulary: int
) -> list[Document]:
    """The documents of a chunk as ids, which lie below `vocabulary`: the words of the model, no gist tokens.

    Raises
    ------
    ValueError
        If a text comes without a tokenizer, a document is empty or holds other ids, or a name is no string that UTF-8
        can write, or comes twice.
    """
    found: dict[str, Document] = {}
    for name, content in chunk:
        if not isinstance(name, str):
            raise ValueError(f"names of documents must be strings, got {name!r}")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the name {name!r} cannot be written as UTF-8 ({error.reason}): choose another"
            ) from error
        if name in found:
            raise ValueError(f"two documents are called {name!r}: names must differ")
        if isinstance(content, str):
            if encode is None:
                raise ValueError(f"document {name!r} is a text: pass a tokenizer, or token ids")
            content = encode(content)
        ids = tuple(int(one) for one in content)
        if not ids:
            raise ValueError(f"document {name!r} is empty: leave it out")
        if wrong := [one for one in ids if not 0 <= one < vocabulary]:
            raise ValueError(
                f"document {name!r} holds token {wrong[0]}, the model's words are 0 to {vocabulary - 1}: gist tokens "
                "are appended by themselves, and a tokenizer must be the model's"
            )
        found[name] = Document(name, ids)
    return list(found.values())


def batches_of(documents: Sequence[Document], batch_tokens: int) -> list[list[int]]:
    """Places of documents in batches of at most `batch_tokens` tokens, padding included (a longer one stands alone)."""
    batches: list[list[int]] = []
    for place in sorted(range(len(documents)), key=lambda one: (-len(documents[one].ids), one)):
        # longest first: the first of a batch says how long its rows are
        if batches and (len(batches[-1]) + 1) * len(documents[batches[-1][0]].ids) <= batch_tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches
