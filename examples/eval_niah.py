"""Evaluate any checkpoint on held-out passkeys, also while its training goes on.

    python examples/eval_niah.py --checkpoint runs/tiny --output out/
    python examples/eval_niah.py --checkpoint runs/tiny --output out/ --rows rows.yaml --full 20

A run's folder stands for its newest checkpoint. What is asked are the rows of its preset's `evaluation`, or those of a
file like it: `- {language: ko, tokens: 6096, samples: 200, filler: prose}`. The output folder gets report.json and
answers.jsonl, a line per answer as it comes: the same command goes on where a killed one was.
"""

from __future__ import annotations

import argparse

from passkey.command_line import at_least, errors_as_one_line, input_file, input_folder, output_folder

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=input_folder, required=True, help="a checkpoint folder, or a run's folder")
    parser.add_argument("--output", type=output_folder, required=True, help="folder for the answers and the report")
    parser.add_argument("--rows", type=input_file, help="what to ask, instead of the preset's own: a .yaml file")
    parser.add_argument("--seed", type=int, default=1, help="draws the questions")
    parser.add_argument(
        "--full", type=at_least(1), default=0, metavar="N", help="of each row, with the whole context too"
    )
    parser.add_argument("--model", help="of an adapter: folder or hub name of its base model, if not its own")
    parser.add_argument("--new-tokens", type=at_least(1), help="most tokens of an answer; by default those of a key")
    parser.add_argument("--overwrite", action="store_true", help="replace another evaluation in the output folder")
    parser.add_argument("--threads", type=at_least(1), default=1)
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        # here and below: what takes seconds to load, and a wrong argument is refused without
        import torch

        from evaluation import evaluate_run
        from passkey.settings import read_evaluation
        from passkey.trained import open_trained

        torch.set_num_threads(given.threads)
        rows = read_evaluation(given.rows) if given.rows else None
        trained = open_trained(given.checkpoint, given.model)
        how = {name: getattr(given, name) for name in ("seed", "full", "new_tokens", "overwrite")}
        evaluate_run(trained, given.output, rows, **how)


if __name__ == "__main__":
    main()
