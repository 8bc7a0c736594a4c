"""Accuracy of a model from the gist rows alone: greedy, compressed before the question is seen.

What is asked is a reader (readers.py); what was trained, and how it is reported, comes opened (trained.py).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gistkern.training import Share
from passkey.answers import AnswerFile
from passkey.data import PasskeyData
from passkey.measure import side_by_side
from passkey.metrics import Answer, judged, parsed, rows_of
from passkey.niah import Sample
from passkey.readers import GistReader, Reader
from passkey.report import write_report
from passkey.trained import Trained

__all__ = ["answer_samples", "build_report", "evaluate_run", "first_of", "swap_test"]

# samples read together: changes nothing in the answers, and of 1 to 10 four were read fastest on CPU
BATCH = 4
DECODING = "greedy, from the gist rows alone; the context is compressed before the question is seen"


def _question_digest(sample: Sample) -> str:
    return hashlib.sha256(json.dumps(asdict(sample), sort_keys=True).encode()).hexdigest()[:16]


def answer_samples(
    reader: Reader,
    samples: Sequence[Sample],
    *,
    batch: int = BATCH,
    stream: Path | None = None,
    overwrite: bool = False,
    show: str = "",
) -> list[Answer]:
    """Answers to all samples, in their order.

    Parameters
    ----------
    reader : Reader
        Who answers.
    samples : sequence of Sample
        Of one or several lengths, languages and tasks.
    batch : int
        Samples read together.
    stream : Path, optional
        File that gets every batch's answers as they come, and whose answers are not asked again.
    overwrite : bool
        Replace a `stream` of another evaluation.
    show : str
        Title of the progress bar; none without.

    Raises
    ------
    ValueError
        If a sample stands there twice, or as `AnswerFile` says.
    """
    digests = [_question_digest(sample) for sample in samples]
    if len(set(digests)) < len(digests):
        raise ValueError("the samples hold the same question twice: pass each dataset once")
    by_digest = dict(zip(digests, samples, strict=True))
    file = AnswerFile(stream, reader.digest, digests, overwrite)
    with tqdm(total=len(samples), initial=len(file.done), desc=show, disable=not show, unit="sample") as bar:
        for group in _batches({d: s for d, s in by_digest.items() if d not in file.done}, batch):
            asked = [by_digest[digest] for digest in group]
            file.add(
                judged(sample, *said, model=reader.digest, digest=digest)
                for digest, sample, said in zip(group, asked, reader.read(asked), strict=True)
            )
            exact = sum(answer.exact for answer in file.done.values()) / len(file.done)
            bar.update(len(group))
            bar.set_postfix_str(f"exact {exact:.1%}")
    return [file.done[digest] for digest in digests]


def _batches(samples: dict[str, Sample], size: int) -> Iterator[list[str]]:
    """Digests in batches of one task and length, so that neither padding nor the answer's length is shared."""
    groups: dict[tuple[str, int], list[str]] = {}
    for digest, sample in samples.items():
        groups.setdefault((getattr(sample, "task", "passkey"), sample.tokens), []).append(digest)
    for group in groups.values():
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def first_of(datasets: Sequence[Sequence[Sample]], count: int | None = None) -> list[Sample]:
    """The first `count` samples (all without) of each dataset."""
    return [sample for dataset in datasets for sample in dataset[:count]]


def swap_test(reader: GistReader, samples: Sequence[Sample]) -> dict[str, Any]:
    """Give each passkey question the cache of the next sample: the answer must be that sample's key, not its own."""
    swapped = own = n = 0
    for begin in range(0, len(samples) - 1, BATCH):
        batch = samples[begin : begin + BATCH]
        if len(batch) < 2:
            continue
        order = torch.roll(torch.arange(len(batch)), -1)
        cache = reader.compress(batch)
        cache.batch_select_indices(order)
        for place, said in enumerate(reader.ask(cache, batch)):
            swapped += parsed(said) == batch[int(order[place])].answer
            own += parsed(said) == batch[place].answer
            n += 1
    return {"n": n, "answers_of_the_swapped_cache": swapped / n, "answers_of_the_own_context": own / n}


def build_report(
    trained: Trained,
    reader: GistReader,
    answers: Sequence[Answer],
    probe: Sequence[Sample],
    measured: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `passkey.report` writes.

    `probe` are passkey samples for the swap test; `measured` is what `side_by_side` found, if it was asked.
    """
    model = reader.model
    return {
        **trained.about,
        "model": {
            "type": model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "decoding": DECODING,
        "compression": reader.compression,
        "rows": rows_of(answers),
        "swap": swap_test(reader, probe) if len(probe) > 1 else None,
        "side_by_side": measured,
    }


def evaluate_run(
    trained: Trained, run: Path, seed: int = 1, *, full: int = 0, overwrite: bool = True
) -> dict[str, Any]:
    """Ask what was trained its settings' held-out questions and write report.json, answers.jsonl and the heatmap.

    The first `full` questions of each of the settings' rows are also asked with the whole context in sight; `overwrite`
    replaces the answers of another evaluation in the folder.
    """
    reader, datasets, settings = trained.reader(), trained.datasets(seed), trained.settings
    title = f"evaluating {settings.name}"
    answers = answer_samples(reader, first_of(datasets), stream=run / "answers.jsonl", overwrite=overwrite, show=title)
    probe = trained.probe(seed + 1)
    measured = None if settings.quantization else side_by_side(trained, probe[0])
    report = build_report(trained, reader, answers, probe, measured)
    report["evaluation_seed"] = seed
    if full:
        stream = run / "answers-full.jsonl"
        options = {"stream": stream, "overwrite": overwrite, "show": f"{title}, full context"}
        report["full_context"] = rows_of(answer_samples(trained.full_reader(), first_of(datasets, full), **options))
    if settings.data.leak:
        report["context_visible"] = context_visible(trained, seed)
    write_report(report, run)
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
