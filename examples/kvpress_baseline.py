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

(examples/smollm2.py writes the folder of the model.) The protocol is that of evaluation.py: each context is
compressed before its question is seen, then the answer is decoded greedily from the rows that were kept; the question
keeps its place behind the whole context. The output folder gets a file of answers per method and budget as they come,
and report.json and report.md after every context: the same command goes on where a killed one was.
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

from answers import AnswerFile
from global_tasks import GlobalSample
from metrics import judged, rows_of
from passkey.command_line import at_least, errors_as_one_line, input_folder, output_folder
from passkey.niah import Sample, read_tokenizer
from passkey.samples import read_samples
from results import command_line, environment, environment_line, table, write_json

__all__ = ["METHODS", "Reader", "draw_samples", "main", "make_press", "page"]

FULL = "full"
METHODS = {
    "knorm": "KnormPress: keys of small norm",
    "keydiff": "KeyDiffPress: keys unlike the mean key",
    "streaming_llm": "StreamingLLMPress: the first 4 tokens and the last ones",
    "tova": "TOVAPress: what the last token attends to",
    "snapkv": "SnapKVPress: the last min(64, rows / 2) tokens and what they attend to",
    "expected_attention": "ExpectedAttentionPress: the first 4 tokens and what queries to come should attend to",
    "adakv": "AdaKVPress of ExpectedAttentionPress: the heads of a layer share its budget",
    "kvzip": "KVzipPress: what repeating the context attends to; all layers and heads share the budget",
}
# these leave their rows in the cache and mask them, by a note on the model that the next prefill wipes
# KVzip also takes the context's start for the chat template's and keeps but 4 rows of as many tokens
MASKING = ("adakv", "kvzip")
# two methods always keep 4 rows, SnapKV half of them
FEWEST_ROWS = 8

# a method and its rows per layer and head
Budget = tuple[str, int]


def make_press(method: str, rows: int, tokens: int) -> Any:
    """The kvpress object that keeps `rows` of `tokens` rows; ValueError if kvpress cannot be imported."""
    kvpress = _kvpress()
    # kvpress keeps int(tokens * (1 - ratio)) rows: half a row more than wanted, so that rounding takes none away
    ratio = 1 - (rows + 0.5) / tokens
    if method == "snapkv":
        # its window is always kept: with the usual 64 tokens a smaller budget would have no row left to choose
        return kvpress.SnapKVPress(ratio, window_size=min(64, rows // 2))
    if method == "adakv":
        return kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio))
    if method == "kvzip":
        return kvpress.KVzipPress(1 - rows / tokens)  # counts the rows of all layers together: nothing to round
    return getattr(kvpress, METHODS[method].split(":")[0])(ratio)


def _kvpress() -> ModuleType:
    try:
        import kvpress
    except ImportError as error:
        raise ValueError(f"kvpress cannot be imported ({error}): --help says how to install it") from error
    return kvpress


class Reader:
    """Reads a context once for all methods that drop rows, and once for each budget of one that masks them.

    Parameters
    ----------
    model : PreTrainedModel
        In the dtype to evaluate.
    tokenizer : tokenizers.Tokenizer
        Of the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def read(self, sample: Sample, budgets: Sequence[Budget]) -> Iterator[tuple[Budget, str, int, int]]:
        """For each budget: what is said, the bytes of the rows it was read from, and those of the full cache.

        Raises
        ------
        ValueError
            If the sample was counted with another tokenizer, or a method does not keep to its budget.
        """
        ids = self._encode(sample.context)
        if ids.shape[1] != sample.tokens:
            raise ValueError(
                f"{sample.id} has {ids.shape[1]} tokens where its file says {sample.tokens}: "
                "make the dataset with this model's tokenizer (niah.py --tokenizer)"
            )
        caches = {budget: DynamicCache() for budget in budgets if budget[0] not in (FULL, *MASKING)}
        whole = DynamicCache()
        with _fan_out(caches, sample.tokens)(self.model):
            self.model.model(input_ids=ids, past_key_values=whole)
        full_bytes = _bytes(whole)
        for budget, cache in caches.items():
            if {layer.keys.shape[2] for layer in cache.layers} != {budget[1]}:
                raise ValueError(f"{budget[0]} did not keep {budget[1]} rows: kvpress 0.5.5 would have")
            size = _bytes(cache)
            yield budget, self._ask(cache, sample), size, full_bytes
        if (FULL, sample.tokens) in budgets:
            yield (FULL, sample.tokens), self._ask(whole, sample), full_bytes, full_bytes
        for budget in budgets:
            if budget[0] in MASKING:
                masked = DynamicCache()
                with make_press(*budget, sample.tokens)(self.model):
                    self.model.model(input_ids=ids, past_key_values=masked)
                yield budget, self._ask(masked, sample), full_bytes * budget[1] // sample.tokens, full_bytes

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
    """Passkey samples of a file of niah.py, `limit` of them spread over it, in an order that ends anywhere fairly.

    Files are ordered by depth, so they are shuffled: a run that is stopped has met needles everywhere.
    """
    samples = read_samples(path)
    if any(isinstance(sample, GlobalSample) for sample in samples):
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
    parser.add_argument(
        "--model", type=input_folder, required=True, help="folder of a transformers model and its tokenizer"
    )
    parser.add_argument("--dataset", type=Path, required=True, help="JSON lines of niah.py, of one length")
    parser.add_argument("--limit", type=int, help="so many samples, spread evenly over the file")
    parser.add_argument(
        "--rows", type=at_least(1), nargs="+", default=[10], help="rows per layer and head that are kept"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=(*METHODS, FULL), default=[*(m for m in METHODS if m not in MASKING), FULL]
    )
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
    files: dict[Budget, AnswerFile] = {}
    who: dict[Budget, str] = {}
    for method, rows in budgets:
        settings = "" if method == FULL else repr(make_press(method, rows, tokens))
        who[method, rows] = _digest(json.dumps([weights, where["versions"], method, rows, settings]).encode())
        path = given.output / f"answers-{method}-{rows}.jsonl"
        files[method, rows] = AnswerFile(path, who[method, rows], by_digest)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    reader = Reader(model, read_tokenizer(given.model / "tokenizer.json"))
    about = {
        "command": command,
        "protocol": "compressed before the question is seen; greedy",
        "model": {"name": given.model.name, "weights": weights[0], "dtype": "float32"},
        "dataset": {"name": given.dataset.name, "digest": _digest(given.dataset.read_bytes())},
        "environment": where,
        "methods": {name: METHODS[name] for name in given.methods if name != FULL},
    }
    for digest, sample in tqdm(by_digest.items(), unit="context"):
        missing = [budget for budget, file in files.items() if digest not in file.done]
        for budget, said, size, full_bytes in reader.read(sample, missing) if missing else ():
            row_bytes = full_bytes // sample.tokens
            files[budget].add([judged(sample, said, budget[1], size, row_bytes, model=who[budget], digest=digest)])
        report = {**about, "rows": _rows(files)}
        write_json(given.output / "report.json", report)
        (given.output / "report.md").write_text(page(report), encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    head = ("method", "rows kept", "ratio", "n", "exact match", "95 % interval", "digits", "wrong number", "abstained")
    lines = [
        (
            "full cache" if row["method"] == FULL else report["methods"][row["method"]],
            f"{row['gist_tokens']:,}",
            f"{row['ratio']:.0f}x",
            row["n"],
            f"{row['exact']:.0%}",
            f"{row['wilson_low']:.1%} to {row['wilson_high']:.1%}",
            f"{row['digit']:.0%}",
            f"{row['hallucinated']:.0%}",
            f"{row['abstained']:.0%}",
        )
        for row in report["rows"]
    ]
    parts = [
        f"# Eviction on the same questions: {report['model']['name']}",
        f"Grade **measured**: `{report['command']}` on {environment_line(report['environment'])}.",
        f"The model as it is, without adapters or training; {report['protocol']}. Rows are kept per layer and head. "
        "Digits: a guess has 10 % of them. Metrics: docs/metrics.md.",
        "\n".join(table(head, lines)),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(files: Mapping[Budget, AnswerFile]) -> list[dict[str, Any]]:
    """Rows in the shape of every report (metrics.py), a method in front; too few samples for a table by depth."""
    return [
        {"method": method, "masked": method in MASKING, **{key: row[key] for key in row if key != "by_depth"}}
        for (method, _), file in files.items()
        for row in rows_of(list(file.done.values()))
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main()
