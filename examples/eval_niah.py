"""Evaluate any checkpoint on any niah.py dataset, also while its training goes on.

    python examples/eval_niah.py --checkpoint runs/tiny --dataset niah-ko.jsonl --output out/ --limit 50

A run's folder stands for its newest checkpoint. Without a dataset the preset's own grid is evaluated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from checkpoints import latest, load_model, load_progress
from evaluation import answer_samples, evaluate_run, rows_of
from niah import Sample
from presets import preset

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint folder, or a run's folder")
    parser.add_argument("--dataset", type=Path, help="JSON lines written by niah.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the answers and the report")
    parser.add_argument("--limit", type=int, help="evaluate so many samples of the dataset only")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    checkpoint = latest(given.checkpoint) or given.checkpoint
    try:
        if not (checkpoint / "progress.json").exists():
            raise ValueError(f"{given.checkpoint} holds no checkpoint: pass a folder that train_niah.py wrote")
        name = load_progress(checkpoint).preset
        settings = preset(name.removesuffix("-leak"), name.endswith("-leak"))
        if given.dataset is None:
            evaluate_run(checkpoint, settings, given.output)
            return
        samples = read_dataset(given.dataset, given.limit)
    except ValueError as error:
        parser.error(str(error))
    model, _, tokenizer = load_model(checkpoint)
    model.eval()
    answers = list(answer_samples(model, tokenizer, samples, settings.segments, "evaluating"))
    config = model.config
    rows = rows_of(answers, 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "report.json").write_text(
        json.dumps({"preset": settings.name, "checkpoint": checkpoint.name, "rows": rows}, indent=1)
    )
    with (given.output / "answers.jsonl").open("w") as out:
        for answer in answers:
            line = {"id": answer.sample.id, "answer": answer.sample.answer, "said": answer.said, "exact": answer.exact}
            out.write(json.dumps(line) + "\n")
    for row in rows:
        print(
            f"{row['language']} {row['tokens']:,} tokens, {row['ratio']:.0f}x: exact {row['exact']:.1%} "
            f"({row['wilson_low']:.1%} to {row['wilson_high']:.1%}, n={row['n']}), digits {row['digit']:.1%}"
        )


def read_dataset(path: Path, limit: int | None) -> list[Sample]:
    """Samples of a JSON-lines file; ValueError names the line that is no sample."""
    samples = []
    for number, line in enumerate(path.read_text().splitlines()[:limit], start=1):
        try:
            samples.append(Sample(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no sample of niah.py: {error}") from error
    if not samples:
        raise ValueError(f"{path} holds no samples")
    return samples


if __name__ == "__main__":
    main()
