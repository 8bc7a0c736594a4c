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
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from checkpoints import Progress, latest, load_model, load_progress, save
from evaluation import evaluate_run
from gistkern.training import Curriculum
from gistkern.training.log_file import entries_before
from models import build
from opened import open_preset
from optimizer import Optimizers
from presets import PRESETS, RECIPES, Preset, preset
from ranks import Ranks
from task import Batch, answer_logits, haystacks, make_batch

__all__ = ["main", "train"]

ALONE = Ranks()


def train(
    settings: Preset,
    seed: int,
    run: Path,
    resume: bool = False,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    accumulate: int = 1,
) -> Path:
    """Train one preset, or with several `ranks` this process's part of it; returns the final checkpoint's folder.

    Each process computes its part of a batch in `accumulate` micro-batches. Batches and what is trained on them do not
    depend on that, nor on the number of processes; both may differ after a resume.

    Raises
    ------
    ValueError
        If `resume` finds no checkpoint, or one of another preset or seed; or if a fresh run finds its folder
        in use, unless it is to `overwrite` the run in it.
    """
    found = latest(run) if resume else None
    if resume:
        if found is None:
            raise ValueError(f"nothing to resume: {run} holds no checkpoint")
        progress = load_progress(found)
        if (progress.preset, progress.seed) != (settings.name, seed):
            raise ValueError(f"{found} is of preset {progress.preset!r}, seed {progress.seed}: pass the same")
        model, handle, tokenizer = load_model(found, trainable=True)
    else:
        if run.exists() and any(run.iterdir()) and not overwrite:
            raise ValueError(f"{run} is in use: pass --resume to go on, --overwrite to start again, or another --run")
        ranks.wait()  # all have looked before one of them clears
        if ranks.is_main:
            _clear(run)
        progress = Progress(settings.name, seed)
        model, handle, tokenizer = build(settings, seed)
    shared = ranks.shared(model, handle.inner.layers)
    optimizers = Optimizers(model, settings.muon_factor, settings.adamw_factor, settings.adamw_betas)
    curriculum = Curriculum(settings.stages, smoothing=settings.smoothing)
    if found is not None:
        optimizers.load_tensors(load_file(found / "optimizer.safetensors"))
        curriculum.load_state_dict(progress.curriculum)
    drawn = haystacks(settings, tokenizer, False, str(seed))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    log_path = run / "log.jsonl"
    if ranks.is_main:
        log_path.write_text(entries_before(log_path, curriculum.step))
    model.train()
    started, start_tokens = time.perf_counter(), progress.tokens
    spent_before, own_before = progress.cpu_seconds, time.process_time()
    expected = curriculum.step + curriculum.remaining_steps
    written = log_path if ranks.is_main else Path(os.devnull)
    with (
        written.open("a") as log,
        tqdm(total=expected, initial=curriculum.step, unit="step", disable=not ranks.is_main) as bar,
    ):
        while not curriculum.finished:
            own = [0.0] * 4
            for share, last, together in ranks.micro_batches(shared, accumulate):
                rng = random.Random(f"{seed}-{curriculum.step}")
                batch = make_batch(drawn, handle, curriculum.stage, settings, rng, share)
                if last or not ranks.all_idle(share, batch.size):
                    with together:
                        part = _forward_backward(shared, batch, settings.leak, ranks.count)
                    own = [sum(pair) for pair in zip(own, part, strict=True)]
            rate = _learning_rate(settings, curriculum, batch.size)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizers.step(rate)
            mean_loss, digit, exact, tokens = ranks.sums(own)
            measured = {"digit": min(1.0, digit), "exact": min(1.0, exact)}  # sums of parts, so rounding may exceed 1
            entry = {"step": curriculum.step, "stage": curriculum.index, "loss": mean_loss, **measured, "lr": rate}
            curriculum.update(measured[settings.gate_on])
            progress.tokens += int(tokens)
            speed = (progress.tokens - start_tokens) / (time.perf_counter() - started)
            entry |= {"running": curriculum.running_accuracy, "tokens": int(tokens)}
            log.write(json.dumps({**entry, "tokens_per_s": round(speed)}) + "\n")
            log.flush()
            bar.total = curriculum.step + curriculum.remaining_steps
            bar.update()
            bar.set_postfix_str(
                f"stage {entry['stage']} loss {entry['loss']:.3f} "
                f"{settings.gate_on} {curriculum.running_accuracy:.3f} {speed:,.0f} tok/s"
            )
            if curriculum.finished or curriculum.step % settings.checkpoint_every == 0:
                progress.curriculum = curriculum.state_dict()
                (own_seconds,) = ranks.sums([time.process_time() - own_before])
                progress.cpu_seconds = spent_before + own_seconds
                save(run, model, tokenizer, optimizers, progress, ranks.is_main)
    ranks.wait()  # for the last checkpoint
    return latest(run)


def _forward_backward(model: nn.Module, batch: Batch, leak: bool, processes: int) -> list[float]:
    """Add the gradients of a share; its part of the mean loss and accuracies, and the tokens it read."""
    logits = answer_logits(model, batch, leak)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
    (loss * batch.weight * processes).backward()  # the mean over the processes is that of the whole batch
    right = (logits.argmax(-1) == batch.answers).float()
    measured = loss.item(), right.mean().item(), right.prod(1).mean().item()
    return [*(batch.weight * one for one in measured), batch.input_ids.numel()]


def _clear(run: Path) -> None:
    """An empty folder for a run: of an earlier one only what a run writes is removed."""
    run.mkdir(parents=True, exist_ok=True)
    for path in (*run.glob("checkpoint-*"), *run.glob(".checkpoint-*.tmp")):
        shutil.rmtree(path)
    for name in ("log.jsonl", "report.json", "report.md", "heatmap.png"):
        (run / name).unlink(missing_ok=True)


def _learning_rate(settings: Preset, curriculum: Curriculum, batch: int) -> float:
    rate = settings.learning_rate * math.sqrt(batch / settings.rate_batch)
    rate *= min(1.0, (curriculum.step + 1) / settings.warmup_steps)
    return rate * max(0.02, 1 - curriculum.progress) if curriculum.is_last else rate


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted({*PRESETS, *RECIPES}))
    parser.add_argument("--seed", type=int, help="of the presets that are no recipe of configs/; 0 by default")
    parser.add_argument("--leak", action="store_true", help="train with the mask off, to see what a leak does")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the same folder")
    parser.add_argument("--run", type=Path, help="output folder; runs/<preset> by default")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="two are faster than one on idle cores, and need OMP_WAIT_POLICY=PASSIVE on busy ones",
    )
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="compute each batch in N micro-batches")
    parser.add_argument("--fsdp", action="store_true", help="share the model between processes (FSDP2), not copy it")
    parser.add_argument("--model", help="of a recipe: folder or hub name of its base model, instead of its own")
    parser.add_argument("--tokenizer", help="of a recipe: folder or hub name; by default the model's")
    parser.add_argument("--dry-run", action="store_true", help="of a recipe: step through it at tiny dimensions")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    ranks = ALONE
    try:
        if given.preset in RECIPES:
            if given.leak or given.seed is not None or given.accumulate != 1 or given.fsdp:
                raise ValueError(
                    f"{given.preset} is a recipe: its file sets seed and accumulation, accelerate's settings how it is "
                    "shared, and it has no --leak"
                )
            from llama3 import open_trained, train_from_config  # brings the Trainer, which nothing else needs

            run = given.run or Path("runs") / given.preset
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
                evaluate_run(open_trained(adapter, given.model), run)
            return
        if given.model or given.tokenizer or given.dry_run:
            raise ValueError(f"--model, --tokenizer and --dry-run are for recipes ({', '.join(sorted(RECIPES))})")
        settings = preset(given.preset, given.leak)
        run = given.run or Path("runs") / settings.name
        if given.accumulate < 1:
            raise ValueError(f"--accumulate counts micro-batches, at least 1, got {given.accumulate}")
        ranks = Ranks.started(given.fsdp)
        checkpoint = train(settings, given.seed or 0, run, given.resume, given.overwrite, ranks, given.accumulate)
    except ValueError as error:
        parser.error(str(error))
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
        evaluate_run(open_preset(checkpoint), run)


if __name__ == "__main__":
    main()
