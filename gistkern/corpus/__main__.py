"""Compress a file of documents on the command line.

    python -m gistkern.corpus --model MODEL --documents documents.jsonl --out corpus/ --segment-length 512
    torchrun --nproc-per-node 4 -m gistkern.corpus ...         # four processes share the work

Each line of the file is {"id": "...", "text": "..."}. The model is a checkpoint that was saved while patched; the
command goes on where a killed one was.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from gistkern.corpus.compressing import compress_corpus


class _Lines:
    """Names and texts of a JSON-lines file, read as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[str, str]]:
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    yield str(entry["id"]), entry["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f'{self.path}, line {number} is no document ({error!r}): expected {{"id": ..., "text": ...}}'
                    ) from error


def _device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gistkern.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a checkpoint with trained gist rows")
    parser.add_argument("--tokenizer", help="folder or hub name; the model's by default")
    parser.add_argument("--documents", type=Path, required=True, help="JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="the store's folder")
    parser.add_argument("--segment-length", type=int, help="tokens per segment; one segment by default")
    parser.add_argument("--segment-overlap", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens compressed together, padding included")
    parser.add_argument("--chunk-documents", type=int, default=256, help="documents of one file, at most")
    parser.add_argument("--chunk-length", type=int, default=4_000_000, help="characters or tokens of one file, at most")
    parser.add_argument("--dtype", default="auto", help="of the model: auto, float32, bfloat16, ...")
    parser.add_argument("--device", default=_device(), help="by default this process's GPU under torchrun, or the CPU")
    given = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gistkern.hf.patch import patch_llama

    try:
        if not given.documents.exists():
            raise ValueError(f"{given.documents} does not exist")
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).to(given.device)
        if getattr(model.config, "gistkern", None) is None:
            raise ValueError(
                f"{given.model} was not saved while patched, so it has no trained gist rows to compress with"
            )
        patch_llama(model)
        store = compress_corpus(
            model,
            _Lines(given.documents),
            given.out,
            AutoTokenizer.from_pretrained(given.tokenizer or given.model),
            segment_length=given.segment_length,
            segment_overlap=given.segment_overlap,
            batch_tokens=given.batch_tokens,
            chunk_documents=given.chunk_documents,
            chunk_length=given.chunk_length,
        )
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(f"{len(store):,} documents in {given.out}")


if __name__ == "__main__":
    main()
