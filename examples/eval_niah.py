"""Evaluate any checkpoint on any datasets of niah.py and global_tasks.py, also while its training goes on.

    python examples/eval_niah.py --checkpoint runs/tiny --dataset niah-ko.jsonl counting-en.jsonl --output out/

A run's folder stands for its newest checkpoint. Without a dataset the preset's own grid is evaluated. The output
folder gets report.json, report.md, plots and answers.jsonl, a line per answer as it comes: the same command goes on
where a killed one was.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from checkpoints import latest, load_model, load_progress
from evaluation import BATCH, FullReader, GistReader, answer_samples, build_report, evaluate_run
from global_tasks import GlobalSample
from measure import side_by_side
from metrics import rows_of
from models import full_context
from niah import Sample
from presets import Preset
from report import write_report
from samples import read_samples
from throughput import BATCHES

__all__ = ["main"]

SWAPPED = 20


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint folder, or a run's folder")
    parser.add_argument("--dataset", type=Path, nargs="+", help="JSON lines of niah.py or global_tasks.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the answers and the report")
    parser.add_argument("--limit", type=int, help="evaluate so many samples of each dataset only")
    parser.add_argument(
        "--full", action="store_true", help="ask the same questions with the whole context in sight too"
    )
    parser.add_argument(
        "--measure", action="store_true", help="time and memory on the longest context, full cache beside"
    )
    parser.add_argument(
        "--new-tokens", type=int, help="most tokens of an answer; as many as a right one has by default"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="samples read together")
    parser.add_argument("--overwrite", action="store_true", help="replace another evaluation in the output folder")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        try:
            checkpoint = _snapshot(given.checkpoint, Path(folder))
            settings = load_progress(checkpoint).settings
            if given.dataset is None:
                evaluate_run(checkpoint, settings, given.output)
            else:
                samples = [sample for path in given.dataset for sample in read_samples(path, given.limit)]
                _evaluate(checkpoint, settings, samples, given)
        except ValueError as error:
            parser.error(str(error))


def _evaluate(checkpoint: Path, settings: Preset, samples: list[Sample], given: argparse.Namespace) -> None:
    model, _, tokenizer = load_model(checkpoint)
    model.eval()
    reader = GistReader(model, tokenizer, settings.segments, given.new_tokens)
    options = {"batch": given.batch, "overwrite": given.overwrite}
    answers = answer_samples(reader, samples, stream=given.output / "answers.jsonl", show="gist rows", **options)
    longest = max(samples, key=lambda sample: sample.tokens)
    passkeys = [sample for sample in samples if not isinstance(sample, GlobalSample)]
    probe = sorted(passkeys, key=lambda sample: -sample.tokens)[:SWAPPED]
    measured = side_by_side(checkpoint, tokenizer, longest, settings.segments, BATCHES) if given.measure else None
    report = build_report(checkpoint, settings.name, reader, answers, probe, measured)
    if given.full:
        full = FullReader(full_context(checkpoint, settings).eval(), tokenizer, given.new_tokens)
        stream = given.output / "answers-full.jsonl"
        report["full_context"] = rows_of(answer_samples(full, samples, stream=stream, show="full context", **options))
    write_report(report, given.output)


def _snapshot(path: Path, folder: Path) -> Path:
    """A copy of the checkpoint: training deletes old ones, and an evaluation may take longer than it keeps them."""
    while True:
        checkpoint = latest(path) or path
        if not (checkpoint / "progress.json").exists():
            raise ValueError(f"{path} holds no checkpoint: pass a folder that train_niah.py wrote")
        try:
            return shutil.copytree(checkpoint, folder / checkpoint.name, ignore=shutil.ignore_patterns("optimizer*"))
        except (shutil.Error, FileNotFoundError):
            if (latest(path) or path) == checkpoint:
                raise
            shutil.rmtree(folder / checkpoint.name, ignore_errors=True)  # deleted meanwhile, for a newer one


if __name__ == "__main__":
    main()
