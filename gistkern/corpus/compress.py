"""`compress_corpus`: many documents, several processes, killed and started again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from gistkern import __version__
from gistkern.cache.file import finite
from gistkern.cache.offload import input_device
from gistkern.corpus.chunk_file import ChunkFile, chunk_path, write_chunk
from gistkern.corpus.index import INDEX, write_index
from gistkern.corpus.journal import Journal
from gistkern.corpus.plan import Document, Documents, batches_of, chunks_of, read_chunk
from gistkern.corpus.rows import CompressedDocument, documents_of
from gistkern.corpus.store import GistStore
from gistkern.corpus.workplace import Workplace
from gistkern.hf.compress import compress_documents
from gistkern.hf.peft_state import active_adapters
from gistkern.layout.arguments import check_count
from gistkern.layout.streams import check_segmentation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gistkern.hf.handle import GistHandle

__all__ = ["compress_corpus"]


def compress_corpus(
    model: PreTrainedModel,
    documents: Documents,
    out_dir: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    segment_length: int | None = None,
    segment_overlap: int = 0,
    chat: str | bool | None = None,
    batch_tokens: int = 16384,
    chunk_documents: int = 256,
    chunk_length: int = 4_000_000,
    rank: int | None = None,
    ranks: int | None = None,
    progress: bool = True,
) -> GistStore:
    """Compress documents into a store on disk. The same call goes on where a killed one was.

    Parameters
    ----------
    model : PreTrainedModel
        Patched and trained; a peft wrapper around it will do.
    documents : mapping or iterable
        Texts or token ids by name, or one after the other (called "0", "1", ...; a pair names its document). The same
        ones in every process and every time; each process reads through all and works on its own.
    out_dir : path
        The store's folder. A chunk of documents is one safetensors file, corpus.json says how it was made.
    tokenizer : PreTrainedTokenizerBase, optional
        For texts, which begin as it begins documents (`gistkern.hf.texts`); it must do so every time.
    segment_length, segment_overlap
        As `gistkern.compress`.
    chat : str or bool, optional
        As `gistkern.ask`: whether texts go through the chat template, and whose turn they begin. Ids are taken as they
        are.
    batch_tokens : int
        Tokens of the documents that are read together, one behind the other; a longer document stands alone. They take
        as many calls of the model as `gistkern.compress` makes of so many tokens, all of them full.
    chunk_documents, chunk_length : int
        Documents of one file: at most so many, and of at most so many characters (texts) or tokens (ids) together. A
        chunk is one process's, which holds its rows until it is finished: take less where processes would have none,
        or memory is short.
    rank, ranks : int, optional
        This process and how many there are; by default those of torchrun, or one alone.
    progress : bool
        Show a bar.

    Returns
    -------
    GistStore
        With all documents if this process was the last to finish.

    Raises
    ------
    ValueError
        If the model is not patched, a document is empty or no text or ids, a text comes without tokenizer, names come
        twice, or the folder holds another corpus, other settings or another model's rows. What can be read twice is
        checked before anything is computed, what comes from an iterator before its chunk is.
    RuntimeError
        If another process works on the same chunk.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> documents = {"one": "The bell is with Mira.", "two": "The lamp is with Jonas."}
    >>> store = gistkern.compress_corpus(model, documents, "corpus", tokenizer, progress=False)
    >>> print(store.totals())
    2 documents, 12 tokens in 6 rows (2.0x), 3,072 bytes
    """
    from gistkern.cache.fingerprint import fingerprint
    from gistkern.hf.chat import chat_context
    from gistkern.hf.handle import handle_of
    from gistkern.hf.texts import check_prefix, context_ids, context_prefix

    handle = handle_of(model)
    check_segmentation(segment_length, segment_overlap)
    check_count("batch_tokens", batch_tokens, least=1)
    check_count("chunk_documents", chunk_documents, least=1)
    check_count("chunk_length", chunk_length, least=1)
    if handle.segment_gist_token_ids and segment_length is None:
        raise ValueError("a model with num_segment_gist_tokens compresses in segments: pass segment_length")
    if tokenizer is not None:
        check_prefix(handle.training.context_prefix, tokenizer, "the model's training")
    rank, ranks = _ranks(rank, ranks)
    role = None if tokenizer is None else handle.training.role_for(chat)
    settings = {
        "fingerprint": fingerprint(handle.inner),
        "positions": handle.positions,
        "sink_tokens": handle.sink_tokens,
        "gist_tokens": [len(handle.gist_token_ids), len(handle.segment_gist_token_ids)],
        "context_prefix": None if tokenizer is None else context_prefix(tokenizer),
        "chat": role,
        "segment_length": segment_length,
        "segment_overlap": segment_overlap,
        "batch_tokens": batch_tokens,
        "chunk_documents": chunk_documents,
        "chunk_length": chunk_length,
    }
    about = _about(handle)
    segments = {"segment_length": segment_length, "segment_overlap": segment_overlap}

    def encode_text(text: str) -> list[int]:
        return context_ids(tokenizer, chat_context(tokenizer, text, role))

    encode = None if tokenizer is None else encode_text
    counts = None
    if not isinstance(documents, Iterator):  # which can be read but once
        # what is wrong with the last document is said before the first one is compressed
        counts = []
        for chunk in chunks_of(documents, chunk_documents, chunk_length):
            ids = [pair for pair in chunk if encode is None or not isinstance(pair[1], str)]
            read_chunk(ids, encode, handle.first_id)
            counts.append(len(chunk))
    total = None if counts is None else sum(counts[rank::ranks])
    found = []
    with (
        Workplace(Path(out_dir), settings, about) as place,
        tqdm(
            total=total,
            unit="document",
            disable=not progress,
            desc="compress" if ranks == 1 else f"rank {rank} of {ranks}",
        ) as bar,
    ):
        for number, chunk in enumerate(chunks_of(documents, chunk_documents, chunk_length)):
            found.append(len(chunk))
            if number % ranks == rank:
                given = read_chunk(chunk, encode, handle.first_id)
                _compress_chunk(model, given, place.open(), number, segments, settings, bar)
        if counts not in (None, found):
            raise ValueError(
                f"documents were {sum(counts or ())} when they were checked and {sum(found)}, or others, when they "
                "were compressed: pass a list or a mapping, or an iterator, which is read once"
            )
        _finish(place.open(), len(found), settings)
    return GistStore(out_dir, input_device(handle.inner))


def _compress_chunk(
    model: PreTrainedModel,
    documents: list[Document],
    folder: Path,
    chunk: int,
    segments: dict[str, Any],
    settings: dict[str, Any],
    bar: tqdm,
) -> None:
    path = chunk_path(folder, chunk)
    journal = Journal(path.with_suffix(".journal"))  # first: while it is locked, nobody else finishes this chunk
    if path.exists():
        journal.close(delete=True)
        _check_documents(ChunkFile(path, chunk, settings), documents)
        bar.update(len(documents))
        return
    (folder / INDEX).unlink(missing_ok=True)  # of a corpus that was complete before
    batches = batches_of(documents, settings["batch_tokens"])
    tokens, started = 0, time.perf_counter()
    try:
        for number, places in enumerate(batches):
            batch = [documents[place] for place in places]
            if number in journal.done:
                _check_record(journal, number, batch)
            else:
                compressed = documents_of(*compress_documents(model, [one.ids for one in batch], **segments))
                if wrong := [one.name for one, rows in zip(batch, compressed, strict=True) if not finite(rows.rows)]:
                    raise ValueError(
                        f"the rows of document {wrong[0]!r} hold inf or NaN: the model overflowed, compress it in "
                        "bfloat16 or float32, or leave the document out"
                    )
                journal.add(number, _record(batch, compressed))
                tokens += sum(len(one.ids) for one in batch)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s")
            bar.update(len(batch))
        compressed_at = {
            place: document
            for number, places in enumerate(batches)
            for place, document in zip(places, _documents(journal.done[number]), strict=True)
        }
        write_chunk(path, chunk, documents, [compressed_at[place] for place in range(len(documents))], settings)
    except BaseException:
        journal.close()
        raise
    journal.close(delete=True)


def _record(batch: list[Document], compressed: list[CompressedDocument]) -> dict[str, torch.Tensor]:
    return {
        "rows": torch.cat([one.rows for one in compressed]),
        "numbers": torch.tensor([[len(one.rows), one.seen, one.tail_position] for one in compressed]),
        "digests": torch.tensor([list(bytes.fromhex(one.digest)) for one in batch], dtype=torch.uint8),
    }


def _documents(record: dict[str, torch.Tensor]) -> list[CompressedDocument]:
    lengths, seen, positions = record["numbers"].T.tolist()
    pieces = record["rows"].split(lengths)
    return [CompressedDocument(*one) for one in zip(pieces, seen, positions, strict=True)]


def _check_record(journal: Journal, number: int, batch: list[Document]) -> None:
    found = [bytes(row.tolist()).hex() for row in journal.done[number]["digests"]]
    if found != [one.digest for one in batch]:
        raise ValueError(
            f"{journal.path} was begun with other documents (batch {number}): pass the same ones in the same order, "
            "or another out_dir"
        )


def _check_documents(file: ChunkFile, documents: list[Document]) -> None:
    for name, digest, document in zip(file.names, file.digests, documents, strict=False):
        if (name, digest) != (document.name, document.digest):
            raise ValueError(
                f"{file.path} holds document {name!r} where {document.name!r} was given"
                + (", with another content" if name == document.name else "")
                + ": pass the same documents in the same order, or another out_dir"
            )
    if len(file.names) != len(documents):
        raise ValueError(
            f"{file.path} holds {len(file.names)} documents, {len(documents)} were given: pass the same ones"
        )


def _about(handle: GistHandle) -> dict[str, str]:
    """By what a store is made, so that who asks it loads the same."""
    model: Any = handle.model
    about = {
        "gistkern": __version__,
        "model": _place(getattr(handle.inner.config, "_name_or_path", "")),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if getattr(model, "is_loaded_in_4bit", False):
        about["bits"] = "4"
    if adapters := active_adapters(model):  # of which only one that `gistkern.load` put there has a known place
        about["adapter"] = _place(handle.adapter or "") if adapters == ["default"] else ""
    return about


def _place(source: str) -> str:
    """A folder by its absolute path, so that it is found from elsewhere; a hub name as it is."""
    return str(Path(source).absolute()) if source and Path(source).is_dir() else source


def _ranks(rank: int | None, ranks: int | None) -> tuple[int, int]:
    if (rank is None) != (ranks is None):
        raise ValueError("pass both rank and ranks, or neither")
    if rank is None or ranks is None:
        said = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not all(one.isdecimal() for one in said):
            raise ValueError("RANK={!r} and WORLD_SIZE={!r} in the environment must be counts".format(*said))
        rank, ranks = int(said[0]), int(said[1])
    check_count("ranks", ranks, least=1)
    check_count("rank", rank)
    if rank >= ranks:
        raise ValueError(f"rank must lie in 0..{ranks - 1}, got {rank}")
    return rank, ranks


def _finish(folder: Path, chunks: int, settings: dict[str, Any]) -> None:
    """Write the index if no chunk is missing: the last process does, or every one that finds it so."""
    paths = [chunk_path(folder, chunk) for chunk in range(chunks)]
    if more := sorted({path.name for path in folder.glob("chunk-*.safetensors")} - {path.name for path in paths}):
        raise ValueError(
            f"{folder} holds {more[0]}, behind the last of the {chunks} chunks that were given: pass all documents "
            "that it was begun with, or another out_dir"
        )
    if chunks and all(path.exists() for path in paths):
        write_index(folder, [ChunkFile(path, chunk, settings).names for chunk, path in enumerate(paths)])
