"""The training loop of the presets: a curriculum of passkey contexts, with checkpoints that a run goes on from."""

from __future__ import annotations

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
from gistkern.training import Curriculum
from gistkern.training.interrupt import Interrupt
from gistkern.training.log_file import entries_before
from models import build
from optimizer import Optimizers
from presets import Preset
from ranks import Ranks
from task import Batch, answer_logits, haystacks, make_batch

__all__ = ["train"]

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
    KeyboardInterrupt
        After Ctrl-C, with a checkpoint of the step that was under way; a second Ctrl-C raises it at once.
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
        Interrupt() as interrupt,
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
            mean_loss, digit, exact, tokens, stop = ranks.sums([*own, interrupt.requested])
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
            if stop or curriculum.finished or curriculum.step % settings.checkpoint_every == 0:
                progress.curriculum = curriculum.state_dict()
                (own_seconds,) = ranks.sums([time.process_time() - own_before])
                progress.cpu_seconds = spent_before + own_seconds
                save(run, model, tokenizer, optimizers, progress, ranks.is_main)
            if stop:
                raise KeyboardInterrupt
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
