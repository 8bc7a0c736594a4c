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
report.json, answers.jsonl and heatmap.png.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

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
    parser.add_argument(
        "--threads",
        type=at_least(1),
        default=1,
        help="two are faster than one on idle cores, and need OMP_WAIT_POLICY=PASSIVE on busy ones",
    )
    parser.add_argument("--accumulate", type=at_least(1), metavar="N", help="compute each batch in N micro-batches")
    parser.add_argument("--model", help="folder or hub name of the pretrained model, instead of the settings' own")
    parser.add_argument("--tokenizer", help="folder or hub name; by default the model's")
    parser.add_argument("--dry-run", action="store_true", help="of a pretrained preset: step through it, tiny")
    given = parser.parse_args(arguments)
    command = sys.argv[1:] if arguments is None else arguments
    run = given.run or Path("runs") / f"{Path(given.preset).stem}{'-leak' * given.leak}"
    with errors_as_one_line(parser), _stopping_cleanly(run, command):
        _train(given, output_folder(str(run)))


def _train(given: argparse.Namespace, run: Path) -> None:
    # here and below: what takes seconds to load, and a wrong argument is refused without
    from passkey.settings import preset_file, read_settings

    settings = read_settings(preset_file(given.preset, given.leak), given.seed)
    import torch

    from passkey.training import dry, train

    torch.set_num_threads(given.threads)
    if given.dry_run:
        if given.model or given.tokenizer:
            raise ValueError("a dry run makes its own model and tokenizer: leave them out")
        settings = dry(settings, run)
    elif (given.model or given.tokenizer) and not settings.model.name:
        raise ValueError(f"--model and --tokenizer are for pretrained models, {settings.name}'s weights are random")
    how = {"resume": given.resume, "overwrite": given.overwrite, "accumulate": given.accumulate}
    try:
        checkpoint = train(settings, run, given.model, given.tokenizer, **how)
    except RuntimeError as error:
        if "RANK" not in os.environ or "onnection" not in str(error):
            raise
        raise SystemExit(
            f"process {os.environ['RANK']} stops: {str(error).splitlines()[0]}\nMost likely another process of this "
            "run has ended, see what it said. Go on with --resume from the newest checkpoint."
        ) from error
    if checkpoint is not None:
        _evaluate(run, given.model)


def _evaluate(run: Path, model: str | None) -> None:
    """Evaluate what was trained; Ctrl-C loses no answer."""
    try:
        from evaluation import evaluate_run
        from passkey.trained import open_trained

        evaluate_run(open_trained(run, model), run)
    except KeyboardInterrupt:
        script = str(Path(sys.argv[0]).with_name("eval_niah.py"))
        model_of = [] if model is None else ["--model", model]
        command = [_python(), script, "--checkpoint", str(run), *model_of, "--output", str(run)]
        _say_stopped("training is over", command)


@contextmanager
def _stopping_cleanly(run: Path, arguments: Sequence[str]) -> Iterator[None]:
    """After Ctrl-C, say where the run stands and the command that goes on."""
    try:
        yield
    except KeyboardInterrupt:
        from passkey.trained import newest_whole

        whole = newest_whole(run)
        launcher = [_python()]
        if "TORCHELASTIC_RUN_ID" in os.environ:
            launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "--"]
        kept = [one for one in arguments if one not in ("--resume", "--overwrite")]
        command = [*launcher, sys.argv[0], *kept, "--resume" if whole else "--overwrite"]
        _say_stopped(f"{whole} is whole" if whole else f"{run} holds no checkpoint yet", command)


def _say_stopped(where: str, command: Sequence[str]) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"\nstopped: {where}. Go on with\n\n    {shlex.join(command)}\n", file=sys.stderr, flush=True)
    raise SystemExit(128 + signal.SIGINT)


def _python() -> str:
    return sys.executable or "python"


if __name__ == "__main__":
    main()
