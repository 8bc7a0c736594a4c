"""Compress documents into a store of gist rows, which `gistkern ask`, gistkern.GistStore and vLLM answer from.

    gistkern compress reports/ --model runs/mine --out store/
    gistkern compress documents.jsonl more.txt --model runs/mine --out store/
    torchrun --nproc-per-node 4 -m gistkern compress ...        # four processes share the work

A folder's text files are documents named by their paths, the lines of a .jsonl are {"id": "...", "text": "..."}.
The same command goes on where a killed one was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from gistkern.cli.model import add_model_options, load_model
from gistkern.cli.parser import at_least, input_path, output_path
from gistkern.cli.source import look_for
from gistkern.progress import announce, is_watched

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("documents", type=input_path, nargs="+", help="folders, text files, JSON lines")
    parser.add_argument("--out", type=output_path, required=True, help="the store's folder")
    add_model_options(parser)
    parser.add_argument("--segment-length", type=at_least(1), help="tokens per segment; by default as in training")
    parser.add_argument("--segment-overlap", type=at_least(0), help="by default as in training")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help="the chat template; as in training")
    parser.add_argument("--batch-tokens", type=at_least(1), default=16384, help="compressed together")
    parser.add_argument("--chunk-documents", type=at_least(1), default=256, help="documents of one file, at most")
    parser.add_argument("--chunk-length", type=at_least(1), default=4_000_000, help="characters of one file, at most")
    parser.add_argument(
        "--plain-model", type=output_path, help="also write the model as a checkpoint without gistkern, for vLLM"
    )


def run(given: argparse.Namespace) -> None:
    """Read, compress, say what there is now."""
    from gistkern.corpus.texts import Texts

    texts = Texts(given.documents)
    if next(iter(texts), None) is None:  # what is wrong with the first one is said before the model is loaded
        raise ValueError(f"{' '.join(map(str, given.documents))}: no documents")
    if given.plain_model is not None:
        if given.four_bits:
            raise ValueError(
                "--plain-model takes no 4-bit weights, which would round the adapter away: leave --4bit out"
            )
        from gistkern.hf.plain import check_plain_folder

        check_plain_folder(given.plain_model, given.model, given.base)
    look_for(given.model)
    announce("starting torch and transformers")
    from gistkern.corpus.compress import compress_corpus
    from gistkern.corpus.plan import DocumentError

    model, tokenizer, handle = load_model(given)
    if tokenizer is None:
        raise ValueError(f"{given.model} has no tokenizer beside it, and its base has none: save it there")
    trained = handle.training
    overlap = trained.segment_overlap if given.segment_length is None else 0
    began = time.perf_counter()
    # all of them, and the weights' fingerprint: what is wrong is said before the work
    announce("reading the documents")
    try:
        store = compress_corpus(
            model,
            texts,
            given.out,
            tokenizer,
            segment_length=given.segment_length or trained.segment_length,
            segment_overlap=overlap if given.segment_overlap is None else given.segment_overlap,
            chat=given.chat,
            batch_tokens=given.batch_tokens,
            chunk_documents=given.chunk_documents,
            chunk_length=given.chunk_length,
            progress=is_watched(),
        )
    except DocumentError as error:
        raise ValueError(f"{texts.where(error.name)}: {error}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None
    took = time.perf_counter() - began
    if given.plain_model is not None and os.environ.get("RANK", "0") == "0":
        from gistkern.hf.plain import save_plain

        announce(f"saving the plain model in {given.plain_model}")
        save_plain(model, given.plain_model, tokenizer)
    if texts.left_out:
        print(f"{texts.left_out:,} files that are no texts were left out", file=sys.stderr)
    print(f"{store.totals()} in {_printable(given.out)}, {took:.1f} s")


def _printable(path: Path) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")
