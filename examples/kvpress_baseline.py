"""What eviction does with as few rows as the gists take: methods of kvpress on the questions of niah.py.

kvpress 0.5.5 wants transformers below 5.3, so it lives in an environment of its own, without gistkern. Of what it
declares, importing it takes the packages below; accelerate and peft it does not take:

    python examples/niah.py --tokenizer build/SmolLM2-135M-Instruct --filler prose --asked-by cue --tokens 2990 \\
        --seed 1 --samples 100 --out build/niah-en-prose.jsonl        # in gistkern's environment
    python -m venv build/kvpress
    build/kvpress/bin/pip install torch==2.13.0 transformers==5.2.0 'cachetools<6' datasets 'fire<0.7' requests
    build/kvpress/bin/pip install --no-deps kvpress==0.5.5
    build/kvpress/bin/python examples/kvpress_baseline.py --model build/SmolLM2-135M-Instruct \\
        --dataset build/niah-en-prose.jsonl --limit 25 --rows 10 30 100 300 --output runs/kvpress

The protocol is evaluation.py's, with so many rows per layer and head; the question keeps its place behind the whole
context. The same command goes on where a killed one was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from passkey.answers import AnswerFile
from passkey.command_line import at_least, errors_as_one_line, input_folder, output_folder
from passkey.metrics import judged, rows_of
from passkey.niah import Sample, read_tokenizer
from passkey.report import command_line, environment, show, write_json
from passkey.samples import read_samples

__all__ = ["METHODS", "Reader", "draw_samples", "main", "make_press"]

FULL = "full"
METHODS = {
    "knorm": "KnormPress",
    "keydiff": "KeyDiffPress",
    "streaming_llm": "StreamingLLMPress",
    "tova": "TOVAPress",
    "snapkv": "SnapKVPress",
    "expected_attention": "ExpectedAttentionPress",
}
FEWEST_ROWS = 8  # two methods always keep 4 rows, SnapKV half of them

Budget = tuple[str, int]  # a method and its rows per layer and head


def make_press(method: str, rows: int, tokens: int) -> Any:
    """The kvpress object that keeps `rows` of `tokens` rows; ValueError if kvpress cannot be imported."""
    kvpress = _kvpress()
    # kvpress keeps int(tokens * (1 - ratio)) rows: half a row more than wanted, so that rounding takes none away
    ratio = 1 - (rows + 0.5) / tokens
    # SnapKV always keeps its window: with the usual 64 tokens a smaller budget would have no row left to choose
    options = {"window_size": min(64, rows // 2)} if method == "snapkv" else {}
    return getattr(kvpress, METHODS[method])(ratio, **options)


def _kvpress() -> ModuleType:
    try:
        import kvpress
    except ImportError as error:
        raise ValueError(f"kvpress cannot be imported ({error}): --help says how to install it") from error
    return kvpress


class Reader:
    """Reads a context once for all methods and budgets."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def read(self, sample: Sample, budgets: Sequence[Budget]) -> Iterator[tuple[Budget, str, int, int]]:
        """For each budget: what is said, the bytes of the rows it was read from, and those of the full cache.

        ValueError if the sample was counted with another tokenizer, or a method does not keep to its budget.
        """
        ids, tokens = self._encode(sample.context), sample.tokens
        if ids.shape[1] != tokens:
            raise ValueError(
                f"{sample.id} has {ids.shape[1]} tokens where its file says {tokens}: "
                "make the dataset with this model's tokenizer (niah.py --tokenizer)"
            )
        caches, whole = {budget: DynamicCache() for budget in budgets if budget[0] != FULL}, DynamicCache()
        with _fan_out(caches, tokens)(self.model):
            self.model.model(input_ids=ids, past_key_values=whole)
        for budget, cache in caches.items():
            if {layer.keys.shape[2] for layer in cache.layers} != {budget[1]}:
                raise ValueError(f"{budget[0]} did not keep {budget[1]} rows: kvpress 0.5.5 would have")
        if (FULL, tokens) in budgets:
            caches[FULL, tokens] = whole
        full_bytes = _bytes(whole)
        for budget, cache in caches.items():
            size = _bytes(cache)
            yield budget, self._ask(cache, sample), size, full_bytes

    def _ask(self, cache: DynamicCache, sample: Sample) -> str:
        """Greedy answer, as long as the right one; `generate` would place it by the rows that are left."""
        ids, place, said = self._encode(sample.question), sample.tokens, []
        for _ in range(self._encode(sample.answer).shape[1]):
            positions = torch.arange(place, place + ids.shape[1])[None]
            place += ids.shape[1]
            logits = self.model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            said.append(int(ids))
        return self.tokenizer.decode(said)

    def _encode(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer.encode(text, add_special_tokens=False).ids])


def _fan_out(caches: Mapping[Budget, DynamicCache], tokens: int) -> Any:
    """A press that lets each budget's press compress the same layer into a cache of its own, and drops nothing."""
    presses = {budget: make_press(*budget, tokens) for budget in caches}

    class FanOut(_kvpress().BasePress):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
            for budget, press in presses.items():
                kept = press.compress(module, hidden_states, keys, values, attentions, kwargs)
                caches[budget].update(*kept, module.layer_idx)
            return keys, values

    return FanOut()


def _bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def draw_samples(path: Path, limit: int | None) -> list[Sample]:
    """Passkeys of a file, `limit` of them spread over it, shuffled: a run that is stopped has met all depths."""
    samples = read_samples(path)
    if any(hasattr(sample, "task") for sample in samples):
        raise ValueError(f"{path}: expected passkeys, as niah.py writes them")
    if len({sample.tokens for sample in samples}) > 1:
        raise ValueError(f"{path}: expected samples of one length, so that a number of rows is one ratio")
    if limit is not None:
        if not 1 <= limit <= len(samples):
            raise ValueError(f"--limit {limit}: {path} holds {len(samples)} samples")
        samples = [samples[index * len(samples) // limit] for index in range(limit)]
    random.Random(0).shuffle(samples)
    return samples


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=input_folder, required=True, help="a transformers model and its tokenizer")
    parser.add_argument("--dataset", type=Path, required=True, help="JSON lines of niah.py, of one length")
    parser.add_argument("--limit", type=int, help="so many samples, spread evenly over the file")
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[10], help="kept per layer and head")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, FULL), default=[*METHODS, FULL])
    parser.add_argument("--output", type=output_folder, required=True, help="folder for the answers and report.json")
    parser.add_argument("--threads", type=at_least(1), default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with errors_as_one_line(parser):
        _run(given, command_line("kvpress_baseline.py", arguments))


def _run(given: argparse.Namespace, command: str) -> None:
    samples = draw_samples(given.dataset, given.limit)
    tokens = samples[0].tokens
    if not FEWEST_ROWS <= min(given.rows) <= max(given.rows) < tokens:
        raise ValueError(f"--rows {given.rows}: expected {FEWEST_ROWS} to {tokens - 1}")
    budgets: list[Budget] = [(FULL, tokens)] if FULL in given.methods else []
    budgets += [(method, rows) for method in given.methods if method != FULL for rows in given.rows]
    _kvpress()
    where = environment("kvpress", "torch", "transformers")
    by_digest = {_digest(json.dumps(asdict(sample), sort_keys=True).encode()): sample for sample in samples}
    weights = [_digest((given.model / name).read_bytes()) for name in ("model.safetensors", "tokenizer.json")]
    files = {}
    for method, rows in budgets:
        press = "" if method == FULL else repr(make_press(method, rows, tokens))
        who = _digest(json.dumps([weights, where["versions"], method, rows, press]).encode())
        files[method, rows] = AnswerFile(given.output / f"answers-{method}-{rows}.jsonl", who, by_digest)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    reader = Reader(model, read_tokenizer(given.model / "tokenizer.json"))
    about = {
        "command": command,
        "protocol": "compressed before the question is seen; greedy",
        "model": {"name": given.model.name, "weights": weights[0], "dtype": "float32"},
        "dataset": {"name": given.dataset.name, "digest": _digest(given.dataset.read_bytes())},
        "environment": where,
    }
    for digest, sample in tqdm(by_digest.items(), unit="context"):
        missing = [budget for budget, file in files.items() if digest not in file.done]
        for budget, said, size, full in reader.read(sample, missing) if missing else ():
            who, rows = files[budget].model, budget[1]
            files[budget].add([judged(sample, said, rows, size, full // tokens, model=who, digest=digest)])
        # in the shape of every report, a method in front; too few samples for a table by depth
        rows = [
            {"method": method, **{key: row[key] for key in row if key != "by_depth"}}
            for (method, _), file in files.items()
            for row in rows_of(list(file.done.values()))
        ]
        write_json(given.output / "report.json", {**about, "rows": rows})
    print(show(rows))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main()
