"""Train gist tokens to carry a passkey, then evaluate.

    python examples/train_niah.py                       # the tiny preset: a Llama from random weights, on CPU
    python examples/train_niah.py --resume              # go on after an interruption, bit for bit
    python examples/train_niah.py --leak                # the mask off: the original failure, reproduced

Writes to runs/<preset>/: checkpoints, log.jsonl, and the evaluation's report.json, report.md and heatmap.png.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from checkpoints import Progress, latest, load_model, load_progress, save
from evaluation import evaluate_run
from gistkern import patch_llama
from niah import Haystack, train_tokenizer
from optimizer import Optimizers
from presets import PRESETS, Preset, preset
from task import answer_logits, build_model, make_batch

__all__ = ["main", "train"]

# a gated stage that does not reach its gate ends after this many times its steps
PATIENCE = 1.5


def train(settings: Preset, seed: int, run: Path, resume: bool = False, overwrite: bool = False) -> Path:
    """Train one preset; returns the final checkpoint's folder.

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
        model, handle, tokenizer = load_model(found)
    else:
        if run.exists() and any(run.iterdir()) and not overwrite:
            raise ValueError(f"{run} is in use: pass --resume to go on, --overwrite to start again, or another --run")
        _clear(run)
        progress = Progress(settings.name, seed)
        tokenizer = train_tokenizer(settings.vocab_size)
        model = build_model(settings, seed)
        handle = patch_llama(
            model,
            num_gist_tokens=settings.gist_tokens,
            num_segment_gist_tokens=settings.segment_gist_tokens,
            positions=settings.positions,
            sink_tokens=settings.sink_tokens,
        )
    optimizers = Optimizers(model, settings.muon_factor, settings.adamw_factor)
    if found is not None:
        optimizers.load_tensors(load_file(found / "optimizer.safetensors"))
    haystacks = {name: Haystack(tokenizer, name, False, random.Random(f"{seed}-{name}")) for name in settings.languages}
    log_path = run / "log.jsonl"
    _truncate_log(log_path, progress.step)
    model.train()
    nominal = sum(stage.steps for stage in settings.stages)
    started, start_tokens = time.perf_counter(), progress.tokens
    with log_path.open("a") as log, tqdm(total=nominal, initial=progress.step, unit="step") as bar:
        while not progress.finished:
            stage = settings.stages[progress.stage]
            rng = random.Random(f"{seed}-{progress.step}")
            haystack = haystacks[rng.choice(settings.languages)]
            haystack.rng = rng
            batch = make_batch(haystack, handle, stage, rng)
            rate = _learning_rate(settings, progress)
            logits = answer_logits(model, batch, settings.leak)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step(rate)
            accuracy = (logits.argmax(-1) == batch.answers).float().mean().item()
            entry = {"step": progress.step, "stage": progress.stage, "loss": loss.item(), "digit": accuracy, "lr": rate}
            _advance(settings, progress, accuracy, batch.input_ids.numel())
            speed = (progress.tokens - start_tokens) / (time.perf_counter() - started)
            log.write(json.dumps({**entry, "running": progress.running_accuracy, "tokens_per_s": round(speed)}) + "\n")
            log.flush()
            bar.total = max(bar.total, progress.step)
            bar.update()
            bar.set_postfix_str(
                f"stage {entry['stage']} loss {entry['loss']:.3f} "
                f"digits {progress.running_accuracy:.3f} {speed:,.0f} tok/s"
            )
            if progress.finished or progress.step % settings.checkpoint_every == 0:
                save(run, model, tokenizer, optimizers, progress)
    return latest(run)


def _clear(run: Path) -> None:
    """An empty folder for a run: of an earlier one only what a run writes is removed."""
    run.mkdir(parents=True, exist_ok=True)
    for path in (*run.glob("checkpoint-*"), *run.glob(".checkpoint-*.tmp")):
        shutil.rmtree(path)
    for name in ("log.jsonl", "report.json", "report.md", "heatmap.png"):
        (run / name).unlink(missing_ok=True)


def _advance(settings: Preset, progress: Progress, accuracy: float, tokens: int) -> None:
    """Count one step, and move to the next stage where this one's gate is passed."""
    stage = settings.stages[progress.stage]
    progress.step += 1
    progress.stage_step += 1
    progress.tokens += tokens
    progress.running_accuracy = 0.95 * progress.running_accuracy + 0.05 * accuracy
    last = progress.stage == len(settings.stages) - 1
    passed = progress.stage_step >= stage.steps and (last or progress.running_accuracy >= stage.gate)
    if not passed and (last or progress.stage_step < PATIENCE * stage.steps):
        return
    if last:
        progress.finished = True
        return
    progress.stage += 1
    progress.stage_step = 0
    progress.running_accuracy = 0.0


def _learning_rate(settings: Preset, progress: Progress) -> float:
    stage = settings.stages[progress.stage]
    rate = settings.learning_rate * math.sqrt(stage.batch_size / 32)
    rate *= min(1.0, (progress.step + 1) / settings.warmup_steps)
    if progress.stage == len(settings.stages) - 1:
        rate *= max(0.02, 1 - progress.stage_step / stage.steps)
    return rate


def _truncate_log(path: Path, step: int) -> None:
    """Drop the entries after the checkpoint that the run goes on from, and a line torn by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] < step:
            kept.append(line + "\n")
    path.write_text("".join(kept))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leak", action="store_true", help="train with the mask off, to see what a leak does")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the same folder")
    parser.add_argument("--run", type=Path, help="output folder; runs/<preset> by default")
    parser.add_argument("--threads", type=int, default=1, help="one is fastest for a model this small")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    settings = preset(given.preset, given.leak)
    run = given.run or Path("runs") / settings.name
    try:
        checkpoint = train(settings, given.seed, run, given.resume, given.overwrite)
    except ValueError as error:
        parser.error(str(error))
    evaluate_run(checkpoint, settings, run)


if __name__ == "__main__":
    main()
