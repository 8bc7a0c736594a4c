"""Evaluate any checkpoint on any datasets of niah.py, also while its training goes on.

    python examples/eval_niah.py --checkpoint runs/tiny --dataset niah-ko.jsonl counting-en.jsonl --output out/

A run's folder stands for its newest checkpoint. Without a dataset the preset's own grid is evaluated. The output
folder gets report.json, heatmap.png and answers.jsonl, a line per answer as it comes: the same command goes on where
a killed one was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from passkey.command_line import at_least, errors_as_one_line, input_folder, output_folder

if TYPE_CHECKING:
    from passkey.niah import Sample
    from passkey.trained import Trained

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=input_folder, required=True, help="a checkpoint folder, or a run's folder")
    parser.add_argument("--model", help="of a recipe's adapter: folder or hub name of its base model, if not its own")
    parser.add_argument("--dataset", type=Path, nargs="+", help="JSON lines of niah.py")
    parser.add_argument("--output", type=output_folder, required=True, help="folder for the answers and the report")
    parser.add_argument("--limit", type=at_least(1), help="evaluate so many samples of each dataset only")
    parser.add_argument(
        "--full",
        type=at_least(0),
        nargs="?",
        const=sys.maxsize,
        default=0,
        metavar="N",
        help="ask the first N questions (all without N) of each dataset with the whole context in sight too",
    )
    parser.add_argument(
        "--measure", action="store_true", help="time and memory on the longest context, full cache beside"
    )
    parser.add_argument(
        "--new-tokens", type=at_least(1), help="most tokens of an answer; as many as a right one has by default"
    )
    parser.add_argument("--batch", type=at_least(1), help="samples read together; 4 by default")
    parser.add_argument("--overwrite", action="store_true", help="replace another evaluation in the output folder")
    parser.add_argument("--threads", type=at_least(1), default=1)
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser), tempfile.TemporaryDirectory() as folder:
        # here and below: what takes seconds to load, and a wrong argument is refused without
        import torch

        from evaluation import evaluate_run
        from passkey.samples import read_samples
        from passkey.trained import open_trained

        torch.set_num_threads(given.threads)
        if given.dataset is None:
            _refuse_options_of_datasets(given)
        datasets = [read_samples(path, given.limit) for path in given.dataset or ()]
        trained = open_trained(_snapshot(given.checkpoint, Path(folder)), given.model)
        if given.dataset is None:
            evaluate_run(trained, given.output, full=given.full, overwrite=given.overwrite)
        else:
            _evaluate(trained, datasets, given)


def _refuse_options_of_datasets(given: argparse.Namespace) -> None:
    for option, default in (("limit", None), ("measure", False), ("new_tokens", None), ("batch", None)):
        if getattr(given, option) != default:
            name = option.replace("_", "-")
            raise ValueError(
                f"--{name} is for datasets, the checkpoint's own grid is asked as it stands: pass --dataset"
            )


def _evaluate(trained: Trained, datasets: list[list[Sample]], given: argparse.Namespace) -> None:
    from evaluation import BATCH, answer_samples, build_report, first_of
    from passkey.global_tasks import GlobalSample
    from passkey.measure import side_by_side
    from passkey.metrics import rows_of
    from passkey.report import write_report
    from passkey.trained import SWAPPED

    samples = first_of(datasets)
    reader = trained.reader(given.new_tokens)
    options = {"batch": given.batch or BATCH, "overwrite": given.overwrite}
    answers = answer_samples(reader, samples, stream=given.output / "answers.jsonl", show="gist rows", **options)
    passkeys = [sample for sample in samples if not isinstance(sample, GlobalSample)]
    probe = sorted(passkeys, key=lambda sample: -sample.tokens)[:SWAPPED]
    measured = None
    if given.measure:
        if trained.settings.quantization:
            raise ValueError("--measure is for models that are not quantized: leave it out")
        measured = side_by_side(trained, max(samples, key=lambda sample: sample.tokens))
    report = build_report(trained, reader, answers, probe, measured)
    if given.full:
        stream = given.output / "answers-full.jsonl"
        full = answer_samples(
            trained.full_reader(given.new_tokens),
            first_of(datasets, given.full),
            stream=stream,
            show="full context",
            **options,
        )
        report["full_context"] = rows_of(full)
    write_report(report, given.output)


def _snapshot(path: Path, folder: Path) -> Path:
    """A copy of the checkpoint: training deletes old ones, and an evaluation may take longer than it keeps them."""
    from passkey.trained import newest, settings_file

    while True:
        checkpoint = newest(path)
        try:
            shutil.copy(settings_file(checkpoint), folder)
            return shutil.copytree(checkpoint, folder / checkpoint.name, ignore=shutil.ignore_patterns("optimizer*"))
        except (shutil.Error, FileNotFoundError):
            if newest(path) == checkpoint:
                raise
            shutil.rmtree(folder / checkpoint.name, ignore_errors=True)  # deleted meanwhile, for a newer one


if __name__ == "__main__":
    main()
