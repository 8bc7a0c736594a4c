"""Accuracy of a model from the gist rows alone: greedy, compressed before the question is seen.

What is asked is a reader (readers.py); what was trained, and how it is reported, comes opened (trained.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gistkern.training import Share
from passkey.answers import AnswerFile
from passkey.data import PasskeyData
from passkey.metrics import Answer, parsed, rows_of
from passkey.niah import Sample
from passkey.readers import Reader
from passkey.report import write_report
from passkey.settings import EvaluationRow
from passkey.trained import Trained

__all__ = ["answer_samples", "evaluate_run", "swap_test"]

# samples read together: changes nothing in the answers, and of 1 to 10 four were read fastest on CPU
BATCH = 4
SWAPPED = 20  # samples of the swap test
DECODING = "greedy, from the gist rows alone; the context is compressed before the question is seen"


def answer_samples(
    reader: Reader,
    datasets: Sequence[Sequence[Sample]],
    *,
    batch: int = BATCH,
    stream: Path | None = None,
    overwrite: bool = False,
    show: str = "",
) -> list[Answer]:
    """Answers to all samples of datasets of one length each, in their order; `batch` of one are read together.

    `stream` is a file that gets every batch's answers as they come, and whose answers are not asked again; `overwrite`
    replaces one of another evaluation. `show` is the title of the progress bar. ValueError if a sample stands there
    twice, or as `AnswerFile` says.
    """
    samples = {sample.digest: sample for dataset in datasets for sample in dataset}
    if len(samples) < sum(map(len, datasets)):
        raise ValueError("the samples hold the same question twice: give each row once")
    file = AnswerFile(stream, reader.digest, samples, overwrite)
    with tqdm(
        total=len(samples), initial=len(file.done), desc=show, disable=None if show else True, unit="sample"
    ) as bar:
        for dataset in datasets:
            missing = [sample for sample in dataset if sample.digest not in file.done]
            for begin in range(0, len(missing), batch):
                said = reader.read(missing[begin : begin + batch])
                file.add(said)
                bar.update(len(said))
                bar.set_postfix_str(f"exact {sum(one.exact for one in file.done.values()) / len(file.done):.1%}")
    return [file.done[digest] for digest in samples]


def swap_test(reader: Reader, samples: Sequence[Sample]) -> dict[str, Any]:
    """Give each question the cache of the next sample: the answer must be that sample's key, not its own."""
    swapped = own = n = 0
    begins = range(0, len(samples) - 1, BATCH)  # a last one alone would have its own
    for begin in tqdm(begins, desc="caches swapped", disable=None, leave=False):
        batch = samples[begin : begin + BATCH]
        others = [*batch[1:], batch[0]]
        cache = reader.compress(batch)
        cache.batch_select_indices(torch.arange(len(batch)).roll(-1))
        for sample, other, said in zip(batch, others, reader.ask(cache, batch), strict=True):
            swapped += parsed(said) == other.answer
            own += parsed(said) == sample.answer
            n += 1
    return {"n": n, "answers_of_the_swapped_cache": swapped / n, "answers_of_the_own_context": own / n}


def evaluate_run(
    trained: Trained,
    folder: Path,
    rows: Sequence[EvaluationRow] | None = None,
    *,
    seed: int = 1,
    full: int = 0,
    new_tokens: int | None = None,
    overwrite: bool = True,
) -> dict[str, Any]:
    """Ask what was trained held-out questions and write report.json and answers.jsonl into a folder.

    Asked are the settings' rows, or others; of each the first `full` questions also with the whole context in sight.
    `seed` draws them, `new_tokens` is as of `Reader`, and `overwrite` replaces another evaluation in the folder.
    """
    rows, settings = rows or trained.settings.evaluation, trained.settings
    reader, datasets = trained.reader(new_tokens), trained.datasets(seed, rows)
    with_context = trained.full_reader(new_tokens) if full else None  # now: training may delete the checkpoint
    longest = max(rows, key=lambda row: row.tokens)
    (probe,) = trained.datasets(seed + 1, [EvaluationRow(longest.language, longest.tokens, SWAPPED)])

    def rows_said(reader: Reader, count: int | None, name: str) -> list[dict[str, Any]]:
        options = {"overwrite": overwrite, "show": f"{settings.name}, {name}"}
        asked = [dataset[:count] for dataset in datasets]
        return rows_of(answer_samples(reader, asked, stream=folder / f"{name}.jsonl", **options))

    report = {
        **trained.about,
        "model": {
            "type": trained.model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
            "dtype": str(trained.model.dtype).removeprefix("torch."),
        },
        "decoding": DECODING,
        "compression": reader.compression,
        "rows": rows_said(reader, None, "answers"),
        "swap": swap_test(reader, probe),
        "evaluation_seed": seed,
    }
    if with_context is not None:
        report["full_context"] = rows_said(with_context, full, "answers-full")
    if settings.data.leak:
        report["context_visible"] = context_visible(trained, seed)
    write_report(report, folder)
    return report


@torch.no_grad()
def context_visible(trained: Trained, seed: int) -> list[dict[str, Any]]:
    """Exact match of a model trained with `--leak` while the context is still in sight, as in its training."""
    found, settings = [], replace(trained.settings, seed=seed)
    stage = replace(settings.curriculum.stages[-1], batch_size=50)
    for language in settings.data.languages:
        alone = replace(settings, data=replace(settings.data, languages=(language,)))
        data = PasskeyData(alone, alone.curriculum.made(), trained.handle, trained.tokenizer, held_out=True)
        batch = data.batch(stage, random.Random(f"{seed}-{language}"), Share())
        said = trained.model(batch["input_ids"], gist_layout=batch["gist_layout"], use_cache=False).logits.argmax(-1)
        wanted = batch["labels"][:, 1:]
        hits = ((said[:, :-1] == wanted) | (wanted == -100)).all(1).float().mean().item()
        found.append({"language": language, "n": len(said), "exact": hits})
    return found
