"""What eviction does with as few rows as the gists take: methods of kvpress on the questions of eval_niah.py.

kvpress 0.5.5 wants transformers below 5.3, so it lives in an environment of its own, without gistkern. Of what it
declares, importing it takes the packages below; accelerate and peft it does not take:

    python -m venv build/kvpress
    build/kvpress/bin/pip install torch==2.13.0 transformers==5.2.0 'cachetools<6' datasets 'fire<0.7' requests
    build/kvpress/bin/pip install --no-deps kvpress==0.5.5 gensim konlpy
    echo '- {language: en, tokens: 2990, samples: 100, filler: prose}' > build/rows.yaml
    build/kvpress/bin/python examples/kvpress_baseline.py --model build/SmolLM2-135M-Instruct \\
        --rows build/rows.yaml --every 4 --keep 10 30 100 300 --output runs/kvpress

The protocol is evaluation.py's, with so many rows kept per layer and head; the question keeps its place behind the
whole context. The same command goes on where a killed one was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from passkey.answers import AnswerFile
from passkey.command_line import at_least, errors_as_one_line, input_file, input_folder, output_folder
from passkey.metrics import Answer, rows_of
from passkey.niah import ASKED_BY, Sample, dataset, read_tokenizer
from passkey.report import command_line, environment, show, write_json

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
    """The kvpress object that keeps `rows` of `tokens` rows."""
    import kvpress

    # it keeps int(tokens * (1 - ratio)) rows: half a row more than wanted, so that rounding takes none away
    ratio = 1 - (rows + 0.5) / tokens
    # SnapKV always keeps its window: with the usual 64 tokens a smaller budget would have no row left to choose
    options = {"window_size": min(64, rows // 2)} if method == "snapkv" else {}
    return getattr(kvpress, METHODS[method])(ratio, **options)


class Reader:
    """Reads a context once for all methods and budgets."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def read(self, sample: Sample, budgets: Sequence[Budget]) -> Iterator[tuple[Budget, Answer]]:
        """What is said to a sample from each budget."""
        import kvpress

        presses = {one: make_press(*one, sample.tokens) for one in budgets if one[0] != FULL}
        caches, whole = {budget: DynamicCache() for budget in presses}, DynamicCache()

        class FanOut(kvpress.BasePress):
            """Lets each press compress the same layer into a cache of its own, and drops nothing."""

            def compress(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
                for budget, press in presses.items():
                    kept = press.compress(module, hidden_states, keys, values, attentions, kwargs)
                    caches[budget].update(*kept, module.layer_idx)
                return keys, values

        with FanOut()(self.model):
            self.model.model(input_ids=self._encode(sample.context), past_key_values=whole)
        row_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in whole.layers) // sample.tokens
        for method, rows in budgets:
            cache = whole if method == FULL else caches[method, rows]
            if {layer.keys.shape[2] for layer in cache.layers} != {rows}:
                raise ValueError(f"{method} did not keep {rows} rows: kvpress 0.5.5 would have")
            yield (method, rows), Answer(sample, self._ask(cache, sample), rows, row_bytes)

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


def draw_samples(path: Path, tokenizer: Tokenizer, **how: Any) -> list[Sample]:
    """The questions of a file of rows, as eval_niah.py reads it; `how` are other arguments of `niah.dataset`."""
    try:
        rows = yaml.safe_load(path.read_text("utf-8"))
        samples = [sample for row in rows for sample in dataset(tokenizer, **row, **how)]
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} holds no rows as eval_niah.py reads them: {error}") from error
    if len({sample.tokens for sample in samples}) != 1:
        raise ValueError(f"{path}: expected samples of one length, so that a number of rows is one ratio")
    return samples


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=input_folder, required=True, help="a transformers model and its tokenizer")
    parser.add_argument("--rows", type=input_file, required=True, help="what to ask, a .yaml file of one length")
    parser.add_argument("--asked-by", choices=ASKED_BY, default="cue", help="a whole question, or its last words")
    parser.add_argument("--seed", type=int, default=1, help="draws the questions")
    parser.add_argument("--every", type=at_least(1), default=1, metavar="N", help="ask every N-th of the questions")
    parser.add_argument("--keep", type=at_least(FEWEST_ROWS), nargs="+", default=[10], help="rows per layer and head")
    parser.add_argument("--methods", nargs="+", choices=(FULL, *METHODS), default=[FULL, *METHODS])
    parser.add_argument("--output", type=output_folder, required=True, help="folder for the answers and report.json")
    parser.add_argument("--threads", type=at_least(1), default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with errors_as_one_line(parser):
        _run(given, command_line("kvpress_baseline.py", arguments))


def _run(given: argparse.Namespace, command: str) -> None:
    tokenizer = read_tokenizer(given.model / "tokenizer.json")
    samples = draw_samples(given.rows, tokenizer, seed=given.seed, asked_by=given.asked_by)[:: given.every]
    tokens = samples[0].tokens
    if max(given.keep) >= tokens:
        raise ValueError(f"--keep {max(given.keep)}: the contexts have {tokens} tokens")
    weights = [_digest((given.model / name).read_bytes()) for name in ("model.safetensors", "tokenizer.json")]
    files, where = {}, environment("kvpress", "torch", "transformers")
    for method in given.methods:
        for rows in [tokens] if method == FULL else given.keep:
            press = "" if method == FULL else repr(make_press(method, rows, tokens))
            who = _digest(json.dumps([weights, where["versions"], method, rows, press]).encode())
            path = given.output / f"answers-{method}-{rows}.jsonl"
            files[method, rows] = AnswerFile(path, who, {sample.digest: sample for sample in samples})
    reader = Reader(AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval(), tokenizer)
    for sample in tqdm(samples, unit="context"):
        missing = [budget for budget, file in files.items() if sample.digest not in file.done]
        for budget, answer in reader.read(sample, missing) if missing else ():
            files[budget].add([answer])
    # in the shape of every report, a method in front
    rows = [{"method": name, **row} for (name, _), file in files.items() for row in rows_of(list(file.done.values()))]
    about = {
        "command": command,
        "protocol": "compressed before the question is seen; greedy",
        "model": {"name": given.model.name, "weights": weights[0], "dtype": "float32"},
        "asked": given.rows.read_text("utf-8"),
        "environment": where,
    }
    write_json(given.output / "report.json", {**about, "rows": rows})
    print(show(rows))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main()
