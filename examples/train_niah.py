"""Train gist tokens to carry a passkey, then evaluate.

    python examples/train_niah.py                       # the tiny preset: a Llama from random weights, on CPU
    python examples/train_niah.py --resume              # go on after an interruption, bit for bit
    python examples/train_niah.py --leak                # the mask off: the original failure, reproduced
    python examples/train_niah.py --preset smollm2      # a pretrained model, LoRA and gist rows
    python examples/train_niah.py --preset llama3-8b    # 4-bit weights (GPU)
    python examples/train_niah.py --preset llama3-8b --dry-run          # the same code at tiny dimensions, on CPU
    python examples/train_niah.py --preset mine.yaml    # settings of your own, like those in configs/
    torchrun --nproc-per-node 2 examples/train_niah.py                  # the same batches, shared by two processes
    accelerate launch --num_processes 2 examples/train_niah.py          # the same; or as your accelerate config says

Writes to runs/<preset>/: checkpoints of transformers' Trainer, log.jsonl, settings.json, and the evaluation's
report.json and answers.jsonl.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from passkey.command_line import at_least, errors_as_one_line, output_folder

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="a file of examples/configs/, or a .yaml file of your own")
    parser.add_argument("--seed", type=at_least(0), help="instead of the settings' own, which is 0 unless they say")
    parser.add_argument("--leak", action="store_true", help="train with the mask off, to see what a leak does")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the same folder")
    parser.add_argument("--run", type=output_folder, help="output folder; runs/<preset> by default")
    parser.add_argument("--threads", type=at_least(1), default=1, help="2 are faster on idle cores")
    parser.add_argument("--accumulate", type=at_least(1), metavar="N", help="compute each batch in N micro-batches")
    parser.add_argument("--model", help="folder or hub name of the pretrained model, instead of the settings' own")
    parser.add_argument("--tokenizer", help="folder or hub name; by default the model's")
    parser.add_argument("--dry-run", action="store_true", help="of a pretrained preset: step through it, tiny")
    given = parser.parse_args(arguments)
    run = given.run or Path("runs") / f"{Path(given.preset).stem}{'-leak' * given.leak}"
    with errors_as_one_line(parser):
        try:
            _train_and_evaluate(given, run)
        except KeyboardInterrupt:
            _say_how_to_go_on(run)
            raise SystemExit(128 + signal.SIGINT) from None


def _train_and_evaluate(given: argparse.Namespace, run: Path) -> None:
    # here and below: what takes seconds to load, and a wrong argument is refused without
    from passkey.settings import preset_file, read_settings

    settings = read_settings(preset_file(given.preset, given.leak), given.seed)
    import torch

    from evaluation import evaluate_run
    from passkey.trained import open_trained
    from passkey.training import dry, train

    torch.set_num_threads(given.threads)
    if given.dry_run:
        if given.model or given.tokenizer:
            raise ValueError("a dry run makes its own model and tokenizer: leave them out")
        settings = dry(settings, run)
    elif (given.model or given.tokenizer) and not settings.model.name:
        raise ValueError(f"--model and --tokenizer are for pretrained models, {settings.name}'s weights are random")
    settings = settings.on(given.model, given.tokenizer)
    if train(settings, run, resume=given.resume, overwrite=given.overwrite, accumulate=given.accumulate):
        evaluate_run(open_trained(run), run)


def _say_how_to_go_on(run: Path) -> None:
    from passkey.trained import newest_whole

    whole = newest_whole(run)
    how = f"{whole} is whole: go on with --resume" if whole else f"{run} holds no checkpoint yet: pass --overwrite"
    if os.environ.get("RANK", "0") == "0":
        print(f"\nstopped. {how}, and all else as it was.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
