"""Gist layouts compared fairly: one model, one curriculum, one budget of rows; every configuration from scratch.

    python examples/compare.py --list
    python examples/compare.py --seeds 0 1              # the whole grid; what is finished is not run again
    python examples/compare.py --only single-10 --only hierarchical-10

Writes runs/compare/<name>-seed<seed>.json, one per configuration and seed, and from all that are there
docs/evidence/compare.json, compare.md and its plots.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from tqdm import tqdm

from compare_layouts import BUDGETS, GRID, Budget, Configuration, draw_batch
from compare_page import write_page
from evaluation import answer_samples
from gistkern import GistHandle
from gistkern.training import Curriculum, GistDataCollator
from metrics import digit_accuracy, parsed, rows_of, wilson
from passkey.command_line import at_least, errors_as_one_line, output_file, output_folder
from passkey.haystack import LANGUAGES
from passkey.niah import KEY_DIGITS, Haystack, Sample, dataset, train_tokenizer
from passkey.optimizer import AskedRate, MuonAdamW, grouped
from passkey.readers import GistReader
from results import environment, read_json, write_json

__all__ = ["capacity", "collect", "main", "run_one", "train"]

EVALUATION_SEED = 1
READ_TOGETHER = 20
RESAMPLES = 1000


def train(configuration: Configuration, budget: Budget, seed: int) -> tuple[GistHandle, dict[str, Any]]:
    """A model trained on the budget, and how that went."""
    handle = configuration.build(seed)
    model = handle.model.train()
    groups = grouped(model.named_parameters(), 1.0, budget.muon_factor, budget.adamw_factor)
    optimizer = MuonAdamW(groups, betas=budget.adamw_betas, weight_decay=0.01)
    schedule = AskedRate(optimizer, lambda: _learning_rate(budget, curriculum.step, rows / budget.rows, len(answers)))
    collate = GistDataCollator(0, handle, **configuration.compression)
    haystack = _training_haystack(budget.language, seed)
    # the budget ends the run, never the last stage's steps
    stages = (*budget.stages[:-1], replace(budget.stages[-1], steps=budget.rows))
    curriculum = Curriculum(stages, budget.patience, budget.smoothing)
    entered: list[dict[str, int]] = []
    rows = contexts = 0
    started = time.process_time()
    with tqdm(total=budget.rows, unit="row", unit_scale=True, desc=f"{configuration.name}, seed {seed}") as bar:
        while rows < budget.rows:
            if len(entered) == curriculum.index:
                entered.append({"step": curriculum.step, "rows": rows, "contexts": contexts})
            rng = random.Random(f"{seed}-{curriculum.step}")
            batch, answers = draw_batch(haystack, collate, curriculum.stage, budget.step_rows, rng)
            labels = batch.pop("labels")
            output = model(**batch, logits_to_keep=KEY_DIGITS + 1, use_cache=False)
            assert labels[:, -KEY_DIGITS:].equal(answers)
            logits = output.logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            schedule.ask()
            optimizer.step()
            optimizer.zero_grad()
            curriculum.update((logits.argmax(-1) == answers).float().mean().item())
            rows += labels.numel()
            contexts += len(answers)
            bar.update(labels.numel())
            bar.set_postfix_str(f"stage {curriculum.index} digit {curriculum.running_accuracy:.3f}")
    return handle, {
        "steps": curriculum.step,
        "rows": rows,
        "contexts": contexts,
        "stages_entered_at": entered,
        "running_digit_accuracy": curriculum.running_accuracy,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def _learning_rate(budget: Budget, step: int, progress: float, contexts: int) -> float:
    rate = budget.learning_rate * math.sqrt(contexts / 32) * min(1.0, (step + 1) / budget.warmup_steps)
    return rate * max(0.02, min(1.0, (1 - progress) / budget.decay))


def capacity(reader: Any, samples: Sequence[Sample], named_question: str) -> dict[str, Any]:
    """How much of all the keys of some contexts is read from their gist rows: every key of every context is asked.

    `reader` is a `GistReader`; a context is compressed once. With digit accuracy a and K keys per context the digits
    recovered are K * KEY_DIGITS * (a - 0.1) / 0.9: guesses hit one digit in ten. The interval resamples contexts
    (bootstrap percentiles; Efron 1979), as the digits of one context stand or fall together.
    """
    keys = len(samples[0].keys)
    per_context: list[float] = []
    exact = rows = 0
    for begin in range(0, len(samples), READ_TOGETHER):
        group = samples[begin : begin + READ_TOGETHER]
        cache = reader.compress(group)
        rows += int(cache.gist_rows.sum())
        right = torch.zeros(len(group), keys)
        for place in range(keys):
            asked = [_asked(sample, place, named_question) for sample in group]
            for index, (said, sample) in enumerate(zip(reader.ask(cache.clone(), asked), asked, strict=True)):
                right[index, place] = digit_accuracy(said, sample.answer)
                exact += parsed(said) == sample.answer
        per_context += right.mean(1).tolist()
    per_row = keys * KEY_DIGITS * len(samples) / rows / 0.9
    draws = numpy.random.default_rng(0).choice(per_context, (RESAMPLES, len(per_context))).mean(1)
    low, high = numpy.percentile(draws, [2.5, 97.5]).tolist()
    digit, questions = sum(per_context) / len(samples), keys * len(samples)
    wilson_low, wilson_high = wilson(exact, questions)
    return {
        "keys": keys,
        "tokens": samples[0].tokens,
        "contexts": len(samples),
        "gist_rows": rows / len(samples),
        "exact": exact / questions,
        "wilson_low": wilson_low,
        "wilson_high": wilson_high,
        "digit": digit,
        "digits_per_row": per_row * (digit - 0.1),
        "low": per_row * (low - 0.1),
        "high": per_row * (high - 0.1),
    }


def _asked(sample: Sample, place: int, named_question: str) -> Sample:
    """The sample with its key of that place asked for; a single key has no name and is asked for without one."""
    name, key = list(sample.keys.items())[place]
    return replace(sample, question=named_question.format(name=name) if name else sample.question, answer=key)


def run_one(configuration: Configuration, budget: Budget, seed: int) -> dict[str, Any]:
    """Train and evaluate one configuration: its part of compare.json."""
    handle, training = train(configuration, budget, seed)
    model, tokenizer = handle.model.eval(), train_tokenizer()
    started = time.process_time()
    reader = GistReader(model, tokenizer, configuration.compression)
    result: dict[str, Any] = _settings(configuration, budget, seed) | {"training": training}
    if budget.keys:
        named = LANGUAGES[budget.language].named_question
        result["capacity"] = [
            capacity(reader, _samples(budget, tokens, keys), named)
            for tokens in budget.evaluate
            for keys in tqdm(budget.keys, desc="capacity", unit="count")
        ]
    else:
        samples = [sample for tokens in budget.evaluate for sample in _samples(budget, tokens, 1)]
        rows = rows_of(answer_samples(reader, samples, batch=READ_TOGETHER, show="evaluating"))
        result["rows"] = [{key: value for key, value in row.items() if key != "by_depth"} for row in rows]
    result["evaluation_cpu_seconds"] = round(time.process_time() - started, 1)
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return result | {"environment": environment("gistkern", "torch", "transformers")}


@lru_cache
def _training_haystack(language: str, seed: int) -> Haystack:
    """Made once for all configurations: every batch brings its own source of chance."""
    return Haystack(train_tokenizer(), language, False, random.Random(f"{seed}-{language}"))


@lru_cache
def _samples(budget: Budget, tokens: int, keys: int) -> list[Sample]:
    return list(dataset(train_tokenizer(), budget.language, tokens, budget.samples, seed=EVALUATION_SEED, keys=keys))


def _settings(configuration: Configuration, budget: Budget, seed: int) -> dict[str, Any]:
    """What a result depends on, as JSON reads it back."""
    settings = {
        "name": configuration.name,
        "configuration": asdict(configuration) | configuration.compression,
        "seed": seed,
        "evaluation_seed": EVALUATION_SEED,
        "budget": asdict(budget),
    }
    return json.loads(json.dumps(settings))


def finished(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a result is there; ValueError if it is of other settings than these."""
    if not path.exists():
        return False
    found = read_json(path)
    for key, value in settings.items():
        if not isinstance(found, dict) or found.get(key) != value:
            raise ValueError(f"{path} was run with another {key}: delete it, or pass another --runs folder")
    return True


def collect(folder: Path, budgets: dict[str, Budget], seeds: Sequence[int], command: str) -> dict[str, Any]:
    """compare.json: every result in the folder that is of these budgets and seeds, in the grid's order."""
    results, not_run = [], []
    for configuration in GRID:
        for seed in seeds:
            settings = _settings(configuration, budgets[configuration.task], seed)
            path = folder / f"{configuration.name}-seed{seed}.json"
            if finished(path, settings):
                results.append(json.loads(path.read_text("utf-8")))
            else:
                not_run.append([configuration.name, seed])
    environments = {json.dumps(result.pop("environment"), sort_keys=True) for result in results}
    return {
        "grade": "measured",
        "command": command,
        "seeds": list(seeds),
        "environments": [json.loads(one) for one in sorted(environments)],
        "not_run": not_run,
        "results": results,
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [configuration.name for configuration in GRID]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help="one configuration; repeatable")
    parser.add_argument("--list", action="store_true", help="name the configurations and say which are finished")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1])
    parser.add_argument("--budget", default="standard", choices=sorted(BUDGETS))
    parser.add_argument("--runs", type=output_folder, default=Path("runs/compare"), help="folder of the single results")
    parser.add_argument(
        "--out", type=output_file, default=Path("docs/evidence/compare.json"), help="the report, a .json"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # fastest for a model this small
    budgets = BUDGETS[given.budget]
    runs = [(one, seed) for seed in given.seeds for one in GRID if one.name in (given.only or names)]
    with errors_as_one_line(parser):
        for configuration, seed in runs:
            path = given.runs / f"{configuration.name}-seed{seed}.json"
            budget = budgets[configuration.task]
            done = finished(path, _settings(configuration, budget, seed))
            if given.list:
                print(f"{configuration.name:32} seed {seed}  {'finished' if done else 'to run'}")
            elif not done:
                write_json(path, run_one(configuration, budget, seed))
        if not given.list:
            command = f"python examples/compare.py --seeds {' '.join(map(str, given.seeds))}"
            command += "" if given.budget == "standard" else f" --budget {given.budget}"
            report = collect(given.runs, budgets, given.seeds, command)
            write_json(given.out, report)
            write_page(report, given.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
