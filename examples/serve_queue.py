"""Serve a queue of questions about compressed documents with transformers: ragged batches from a store.

    python examples/serve_queue.py --checkpoint runs/smollm2 --output runs/serving

The documents are passkey contexts of the checkpoint's preset; several requests ask about each, in a shuffled queue. The
output folder gets the store (corpus/), the trained weights without anything of gistkern (model/), and the requests
with their answers: what examples/vllm_queue.py serves again and compares with.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from passkey.command_line import at_least, errors_as_one_line, input_folder, output_folder
from passkey.report import write_json

if TYPE_CHECKING:
    from gistkern import GistStore
    from passkey.niah import Sample
    from passkey.readers import GistReader

__all__ = ["main", "serve"]


def serve(reader: GistReader, store: GistStore, queue: Sequence[Sample], batch: int) -> list[str]:
    """What is said to each request, in batches as they come; those about one document read the same rows."""
    said: list[str] = []
    for first in tqdm(range(0, len(queue), batch), unit="batch"):
        requests = queue[first : first + batch]
        said += reader.ask(store.batch([one.id for one in requests], shared=True), requests)
    return said


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=input_folder, required=True, help="a checkpoint folder, or a run's folder")
    parser.add_argument(
        "--output", type=output_folder, required=True, help="folder for store, weights, requests and answers"
    )
    parser.add_argument(
        "--documents", type=at_least(1), default=40, help="of the longest contexts that the preset is evaluated on"
    )
    parser.add_argument("--requests", type=at_least(1), default=3, help="about each document")
    parser.add_argument("--batch", type=at_least(1), default=8, help="requests answered together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=at_least(1), default=1)
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        _run(given)


def _run(given: argparse.Namespace) -> None:
    # only here: they take seconds to load, and a wrong argument is refused without them
    import torch

    from gistkern import compress_corpus
    from passkey.trained import open_trained

    torch.set_num_threads(given.threads)
    opened = open_trained(given.checkpoint)
    longest = max(opened.datasets(given.seed), key=lambda samples: samples[0].tokens)
    reader, samples = opened.reader(), longest[: given.documents]
    encoded = opened.tokenizer([one.context for one in samples], add_special_tokens=False)["input_ids"]
    contexts = {sample.id: [*opened.start, *ids] for sample, ids in zip(samples, encoded, strict=True)}
    store = compress_corpus(opened.model, contexts, given.output / "corpus", **opened.compression)
    queue = samples * given.requests
    random.Random(given.seed).shuffle(queue)
    said = serve(reader, store, queue, given.batch)
    requests = [
        {"document": one.id, "question": one.question, "answer": one.answer, "said": text}
        for one, text in zip(queue, said, strict=True)
    ]
    write_json(given.output / "requests.json", {"requests": requests})
    opened.handle.unpatch()
    vars(opened.model.config).pop("gistkern", None)  # the settings of a checkpoint that was written patched
    opened.model.save_pretrained(given.output / "model")
    opened.tokenizer.save_pretrained(given.output / "model")
    right = sum(one["said"] == one["answer"] for one in requests)
    print(f"{right} of {len(requests)} answers right, about {len(samples)} documents of {samples[0].tokens} tokens")


if __name__ == "__main__":
    main()
