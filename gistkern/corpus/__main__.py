"""Compress a file of documents on the command line.

    python -m gistkern.corpus --model MODEL --documents documents.jsonl --out corpus/ --segment-length 512
    torchrun --nproc-per-node 4 -m gistkern.corpus ...         # four processes share the work

Each line of the file is {"id": "...", "text": "..."}. The model is a checkpoint that was saved while patched; the
command goes on where a killed one was.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = """{model} is a peft adapter: merge it into its base first,
    base = AutoModelForCausalLM.from_pretrained(BASE)
    gistkern.patch_llama(base)   # with the settings of the training, which {model}/gistkern.json holds
    PeftModel.from_pretrained(base, {model!r}).merge_and_unload().save_pretrained(FOLDER)
and pass that folder as --model"""


def main(arguments: list[str] | None = None) -> None:
    """Command line; exit status 2 for input that is refused."""
    parser = _parser()
    given = parser.parse_args(arguments)
    # behind the parser, so that --help and a mistyped option are answered at once
    from gistkern.corpus.compress import compress_corpus
    from gistkern.corpus.lines import Lines
    from gistkern.corpus.plan import DocumentError

    try:
        lines = Lines(given.documents)
        _check_model(given)
        if next(iter(lines), None) is None:  # a broken first line is said before the model is loaded
            raise ValueError(f"{given.documents} holds no documents")
        if given.out.exists() and not given.out.is_dir():
            raise ValueError(f"--out {given.out} is a file: pass a folder")
        model, tokenizer = _load(given)
        store = compress_corpus(
            model,
            lines,
            given.out,
            tokenizer,
            segment_length=given.segment_length,
            segment_overlap=given.segment_overlap,
            batch_tokens=given.batch_tokens,
            chunk_documents=given.chunk_documents,
            chunk_length=given.chunk_length,
        )
    except DocumentError as error:
        parser.error(f"{lines.where(error.name)}: {error}")
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    said = os.fsencode(given.out).decode(errors="backslashreplace")
    print(f"{len(store):,} documents in {said}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gistkern.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a checkpoint with trained gist rows")
    parser.add_argument("--tokenizer", help="folder or hub name; the model's by default")
    parser.add_argument("--documents", type=_path, required=True, help="JSON lines")
    parser.add_argument("--out", type=_path, required=True, help="the store's folder")
    parser.add_argument("--segment-length", type=int, help="tokens per segment; one segment by default")
    parser.add_argument("--segment-overlap", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens compressed together, padding included")
    parser.add_argument("--chunk-documents", type=int, default=256, help="documents of one file, at most")
    parser.add_argument("--chunk-length", type=int, default=4_000_000, help="characters or tokens of one file, at most")
    parser.add_argument("--dtype", default="auto", help="of the model: auto, float32, bfloat16, ...")
    parser.add_argument("--device", help="by default this process's GPU under torchrun, or the CPU")
    return parser


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty, which would be this folder")
    return Path(text)


def _check_model(given: argparse.Namespace) -> None:
    """Raise ValueError, saying what to pass, before weights are read that nothing can be done with."""
    import torch
    from transformers import AutoConfig

    from gistkern.cache.file import check_device

    if given.device is None:
        given.device = _device()
    check_device(given.device)
    dtype = getattr(torch, given.dtype, None)
    if given.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype {given.dtype} is none that a model computes in: pass auto, float32 or bfloat16")
    if (Path(given.model) / "adapter_config.json").exists():
        raise ValueError(_ADAPTER.format(model=given.model))
    if getattr(_from_pretrained(AutoConfig, "model", given.model), "gistkern", None) is None:
        raise ValueError(f"{given.model} was not saved while patched, so it has no trained gist rows to compress with")


def _load(given: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The patched model and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gistkern.hf.patch import patch_llama

    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", given.tokenizer or given.model)
    model = _from_pretrained(AutoModelForCausalLM, "model", given.model, dtype=given.dtype).to(given.device)
    try:
        patch_llama(model)
    except TypeError as error:
        raise ValueError(f"{given.model} cannot be patched: {error}") from error
    return model, tokenizer


def _from_pretrained(loader: Any, what: str, name: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(name, **options)
    except Exception as error:  # of many kinds, all from what is in that folder or not
        raise ValueError(f"the {what} {name} cannot be loaded ({type(error).__name__}: {error})") from error


def _device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
