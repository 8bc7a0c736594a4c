"""Train gist tokens to carry a passkey, then evaluate.

    python examples/train_niah.py                       # the tiny preset: a Llama from random weights, on CPU
    python examples/train_niah.py --resume              # go on after an interruption, bit for bit
    python examples/train_niah.py --leak                # the mask off: the original failure, reproduced
    python examples/train_niah.py --preset smollm2      # a pretrained model, LoRA and gist rows
    python examples/train_niah.py --preset llama3-8b    # a recipe of configs/, through transformers' Trainer (GPU)
    python examples/train_niah.py --preset llama3-8b --dry-run          # the same code at tiny dimensions, on CPU
    torchrun --nproc-per-node 2 examples/train_niah.py                  # the same batches, shared by two processes
    torchrun --nproc-per-node 2 examples/train_niah.py --fsdp --accumulate 2    # the model shared, in micro-batches
    accelerate launch --multi_gpu --num_processes 2 examples/train_niah.py      # as torchrun, GPUs or not

Writes to runs/<preset>/: checkpoints, log.jsonl, and the evaluation's report.json, report.md and heatmap.png.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from passkey.command_line import at_least, errors_as_one_line, output_folder
from presets import PRESETS, RECIPES, preset
from results import newest_whole

if TYPE_CHECKING:
    from opened import Opened

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted({*PRESETS, *RECIPES}))
    parser.add_argument("--seed", type=int, help="of the presets that are no recipe of configs/; 0 by default")
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
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute each batch in N micro-batches")
    parser.add_argument("--fsdp", action="store_true", help="share the model between processes (FSDP2), not copy it")
    parser.add_argument("--model", help="of a recipe: folder or hub name of its base model, instead of its own")
    parser.add_argument("--tokenizer", help="of a recipe: folder or hub name; by default the model's")
    parser.add_argument("--dry-run", action="store_true", help="of a recipe: step through it at tiny dimensions")
    given = parser.parse_args(arguments)
    run = given.run or Path("runs") / (f"{given.preset}-leak" if given.leak else given.preset)
    command = sys.argv[1:] if arguments is None else arguments
    with errors_as_one_line(parser), _stopping_cleanly(run, command):
        output_folder(str(run))
        import torch

        torch.set_num_threads(given.threads)
        (_recipe if given.preset in RECIPES else _preset)(given, run)


def _recipe(given: argparse.Namespace, run: Path) -> None:
    if given.leak or given.seed is not None or given.accumulate != 1 or given.fsdp:
        raise ValueError(
            f"{given.preset} is a recipe: its file sets seed and accumulation, accelerate's settings how it is "
            "shared, and it has no --leak"
        )
    from llama3 import open_trained, train_from_config  # brings the Trainer, which nothing else needs

    adapter = train_from_config(
        RECIPES[given.preset],
        run,
        given.model,
        given.tokenizer,
        resume=given.resume,
        overwrite=given.overwrite,
        dry_run=given.dry_run,
    )
    if adapter is not None:
        _evaluate(partial(open_trained, adapter, given.model), run, ["--checkpoint", str(adapter)], given.model)


def _preset(given: argparse.Namespace, run: Path) -> None:
    if given.model or given.tokenizer or given.dry_run:
        raise ValueError(f"--model, --tokenizer and --dry-run are for recipes ({', '.join(sorted(RECIPES))})")
    if given.accumulate < 1:
        raise ValueError(f"--accumulate counts micro-batches, at least 1, got {given.accumulate}")
    settings = preset(given.preset, given.leak)
    from checkpoints import latest
    from opened import open_preset
    from ranks import Ranks
    from training_run import train

    ranks = Ranks.started(given.fsdp)
    try:
        checkpoint = train(settings, given.seed or 0, run, given.resume, given.overwrite, ranks, given.accumulate)
    except RuntimeError as error:
        if ranks.count == 1 or "onnection" not in str(error):
            raise
        whole = latest(run)
        again = f"--resume: {whole} is whole" if whole else "--overwrite: there is no checkpoint yet"
        raise SystemExit(
            f"process {ranks.index} of {ranks.count} stops: {str(error).splitlines()[0]}\nMost likely another process "
            f"of this run has ended, see what it said. Start the command again with {again}"
        ) from error
    ranks.leave()
    if ranks.is_main:
        _evaluate(partial(open_preset, checkpoint), run, ["--checkpoint", str(run)])


def _evaluate(opened: Callable[[], Opened], run: Path, checkpoint: list[str], model: str | None = None) -> None:
    """Evaluate what was trained; Ctrl-C loses no answer."""
    try:
        from evaluation import evaluate_run

        evaluate_run(opened(), run)
    except KeyboardInterrupt:
        script = str(Path(sys.argv[0]).with_name("eval_niah.py"))
        model_of = [] if model is None else ["--model", model]
        _say_stopped("training is over", [_python(), script, *checkpoint, *model_of, "--output", str(run)])


@contextmanager
def _stopping_cleanly(run: Path, arguments: Sequence[str]) -> Iterator[None]:
    """After Ctrl-C, say where the run stands and the command that goes on."""
    try:
        yield
    except KeyboardInterrupt:
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


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from training_run import train  # with all that it brings, which takes seconds: not before arguments are read

    return train


if __name__ == "__main__":
    main()
