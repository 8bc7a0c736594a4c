"""A run: `GistTrainer` on the settings' model, data, curriculum and optimizer, with a folder that is its own."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from gistkern.training import Curriculum, GistTrainer, curves_of
from passkey.data import PasskeyData
from passkey.models import adapted, fast_tokenizer, patched, random_llama
from passkey.optimizer import MuonAdamW, grouped
from passkey.settings import Settings, made, overlaid, read_yaml, settings_of
from passkey.trained import SETTINGS, newest_whole, progress_of

__all__ = ["PasskeyTrainer", "dry", "train"]

DRY = Path(__file__).with_name("dry.yaml")
TINY_MODEL = "tiny-model"
WRITTEN = ("log.jsonl", "curves.png", "report.json", "answers.jsonl", "answers-full.jsonl")


def train(
    settings: Settings, run: Path, *, resume: bool = False, overwrite: bool = False, accumulate: int | None = None
) -> Path | None:
    """Train; returns the folder of the last checkpoint, or None in all processes but the main one.

    The settings are kept in the run's folder, for whoever reads the checkpoints. `resume` goes on from the newest one,
    `overwrite` replaces what an earlier run left. `accumulate` micro-batches make a step: their number changes nothing
    in the result but rounding, and may differ after a resume.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        raise ValueError("accelerate shards models on GPUs only, and would train copies here: launch without FSDP")
    state = PartialState(cpu=not torch.cuda.is_available())
    checkpoint = _resumed(settings, run) if resume else None
    if not resume and not overwrite and run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} is in use: pass --resume to go on, --overwrite to start again, or another --run")
    state.wait_for_everyone()  # all have looked before one of them clears
    if state.is_main_process and not resume:
        _start(settings, run)
    state.wait_for_everyone()
    if checkpoint is None or not progress_of(checkpoint)["finished"]:
        trainer = PasskeyTrainer(settings, run, accumulate)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except SafetensorError as error:
            raise ValueError(f"{checkpoint} cannot be loaded: {error}") from error
        del trainer  # a DistributedDataParallel that outlives its process group can wait for it for ever
        gc.collect()
        if state.is_main_process:
            print(curves_of(run)[1])
    state.wait_for_everyone()
    is_main = state.is_main_process
    state.destroy_process_group()  # what follows is for the main process alone
    return newest_whole(run) if is_main else None


def _resumed(settings: Settings, run: Path) -> Path:
    """The checkpoint to go on from."""
    checkpoint, file = newest_whole(run), run / SETTINGS
    if checkpoint is None:
        raise ValueError(f"nothing to resume: {run} holds no checkpoint")
    if not file.exists() or file.read_text("utf-8") != settings.written():
        raise ValueError(f"{run} is a run of other settings or another seed (see {file}): pass the same")
    return checkpoint


def _start(settings: Settings, run: Path) -> None:
    """A folder for a run: of an earlier one only what a run writes is removed."""
    run.mkdir(parents=True, exist_ok=True)
    for path in (*run.glob("checkpoint-*"), run / TINY_MODEL):
        shutil.rmtree(path, ignore_errors=True)
    for name in WRITTEN:
        (run / name).unlink(missing_ok=True)
    (run / SETTINGS).write_text(settings.written(), "utf-8")
    if settings.model.name == str(run / TINY_MODEL):
        random_llama(settings).to(getattr(torch, settings.model.dtype)).save_pretrained(run / TINY_MODEL)
        fast_tokenizer().save_pretrained(run / TINY_MODEL)


def training_arguments(
    settings: Settings, run: Path, max_steps: int, accumulate: int | None = None
) -> TrainingArguments:
    """Of the settings' section, and what a script that is watched at a terminal wants."""
    given = {"save_total_limit": 2, "report_to": "none", **settings.training}
    if accumulate is not None:
        given["gradient_accumulation_steps"] = accumulate
    return made(
        TrainingArguments,
        given,
        "training",
        output_dir=str(run),
        max_steps=max_steps,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        include_num_input_tokens_seen="all",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )


class PasskeyTrainer(GistTrainer):
    """`GistTrainer` on the model, the data and the curriculum of settings, with their optimizer, if they have one."""

    def __init__(self, settings: Settings, run: Path, accumulate: int | None = None) -> None:
        self.settings, curriculum = settings, settings.curriculum.made()
        base, handle, tokenizer = patched(settings)
        data = PasskeyData(settings, curriculum, handle, tokenizer)
        super().__init__(
            adapted(settings, base),
            training_arguments(settings, run, curriculum.max_steps, accumulate),
            data_collator=data.collator,
            train_dataset=data,
            processing_class=tokenizer,
            objectives=settings.objectives,
            curriculum=curriculum,
            callbacks=[Bar(curriculum)],
        )
        self.remove_callback(PrinterCallback)  # of every log entry, a line

    def create_optimizer(self, model=None):
        """Muon and AdamW, or what the TrainingArguments say."""
        wanted = self.settings.optimizer
        if wanted is not None and self.optimizer is None:
            parameters = (self.model if model is None else model).named_parameters()
            groups = grouped(parameters, self.args.learning_rate, wanted.muon, wanted.adamw)
            self.optimizer = MuonAdamW(groups, betas=wanted.betas, weight_decay=self.args.weight_decay)
            # the Trainer sets rates after an update, when nobody knows the next batch yet, nor the curriculum's stage
            self.optimizer.register_step_pre_hook(lambda *_: self.lr_scheduler.step())
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As `create_optimizer`."""
        if self.settings.optimizer is not None and self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda _: self._rate())
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _rate(self) -> float:
        """Grows with the batch's root and over the first steps, and falls in the last stage."""
        curriculum = self.curriculum
        rate = math.sqrt(self.train_dataset.size / self.settings.optimizer.rate_batch)
        rate *= min(1.0, (curriculum.step + 1) / max(1, self.args.warmup_steps))
        return rate * max(0.02, 1 - curriculum.progress) if curriculum.is_last else rate


class Bar(ProgressCallback):
    """transformers' progress bar, up to the steps that there will be if the gates are passed in time."""

    def __init__(self, curriculum: Curriculum) -> None:
        super().__init__()
        self.curriculum = curriculum

    def on_step_end(self, args, state, control, **kwargs):
        """Count."""
        if self.training_bar is not None:
            self.training_bar.total = self.curriculum.step + self.curriculum.remaining_steps
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show stage, loss and accuracy."""
        if self.training_bar is not None and "stage" in logs:
            accuracy = f"{self.curriculum.measure} {logs['running_accuracy']:.3f}"
            self.training_bar.set_postfix_str(f"stage {logs['stage']} loss {logs['loss']:.3f} {accuracy}")


def dry(settings: Settings, run: Path) -> Settings:
    """The same run at tiny dimensions, with short contexts and few steps, on a model of its own in the run's folder."""
    if not settings.model.name:
        raise ValueError(f"--dry-run is for pretrained models, {settings.name} starts from random weights")
    changed = overlaid(json.loads(settings.written()), read_yaml(DRY))
    changed["model"] |= {"name": str(run / TINY_MODEL), "tokenizer": "", "gguf_package": ""}
    return settings_of(settings.name, changed, str(DRY))
