"""`finetune`: from a file of rows to a saved adapter with its numbers; what ``gistkern train`` runs."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainingArguments

from gistkern.training.answering import WAYS, answered
from gistkern.training.base import Base
from gistkern.training.checkpoints import newest_whole
from gistkern.training.collator import GistDataCollator
from gistkern.training.generation import AnswerEvaluation
from gistkern.training.objectives import Objectives
from gistkern.training.rows import Tokenized
from gistkern.training.scores import text_metrics
from gistkern.training.trainer import GistTrainer

__all__ = ["Finetuning", "Outcome", "finetune"]

SETTINGS = "training.json"
_WRITTEN_FIRST = {SETTINGS, "log.jsonl", "runs"}  # by a run that has no checkpoint yet
EVALUATIONS, _LONGEST = 5, 500
CUE = "\n\nRepeat the text above:\n"
# arguments of transformers that have an option here, or follow from others
_OPTIONS = {
    "output_dir": "--output",
    "num_train_epochs": "--epochs",
    "max_steps": "--steps",
    "per_device_train_batch_size": "--batch",
    "gradient_accumulation_steps": "--accumulate",
    "learning_rate": "--rate",
    "warmup_steps": "--warmup",
    "seed": "--seed",
    "eval_steps": "--eval-every",
    "save_steps": "--save-every",
    "eval_strategy": "--eval-every",
    "save_strategy": "--save-every",
}


@dataclass(frozen=True)
class Finetuning:
    """What a run depends on, beside its model and rows; defaults are those of ``gistkern train``.

    `config` holds further `transformers.TrainingArguments`.
    """

    segment_length: int | None = None
    segment_overlap: int = 0
    objectives: Objectives = field(default_factory=Objectives)
    role: str | None = None
    steps: int | None = None
    epochs: float = 3.0
    batch: int = 4
    accumulate: int = 1
    rate: float | None = None
    warmup: float = 0.03
    seed: int = 0
    eval_every: int | None = None
    eval_samples: int = 100
    save_every: int | None = None
    tensorboard: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for what contradicts, before anything is loaded."""
        known = TrainingArguments.__dataclass_fields__
        for name in self.config:
            if name in _OPTIONS:
                raise ValueError(f"--config gives {name}, which is the option {_OPTIONS[name]}")
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise ValueError(
                    f"--config gives {name}, which is none of transformers' TrainingArguments"
                    + (f" (did you mean {near[0]}?)" if near else "")
                )
        if self.eval_every and self.save_every and self.save_every % self.eval_every:
            raise ValueError("--save-every must be a multiple of --eval-every: the best checkpoint has to be there")

    def arguments(self, output: Path, base: Base, rows: int, evaluated: bool) -> TrainingArguments:
        """Those of transformers."""
        shares = self.batch * self.accumulate * PartialState().num_processes
        steps = self.steps or math.ceil(math.ceil(rows / shares) * self.epochs)
        every = self.eval_every or self.save_every or max(1, min(_LONGEST, math.ceil(steps / EVALUATIONS)))
        on_gpu = torch.cuda.is_available()
        rate = self.rate or (2e-4 if base.lora else 2e-5)
        given: dict[str, Any] = {
            "max_steps": steps,
            "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulate,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.warmup,
            "seed": self.seed,
            "bf16": base.computed_in() == torch.bfloat16 or (on_gpu and torch.cuda.is_bf16_supported()),
            "logging_steps": max(1, min(10, steps // 20)),
            "save_strategy": "steps",
            "save_steps": self.save_every or every,
            "save_total_limit": 2,
            "report_to": "tensorboard" if self.tensorboard else "none",
            "ddp_find_unused_parameters": False,
            "ddp_broadcast_buffers": False,
            "dataloader_pin_memory": on_gpu,
            "use_cpu": not on_gpu,
            "disable_tqdm": False,
        }
        if evaluated:
            best = {"metric_for_best_model": "generation_best", "load_best_model_at_end": True}
            given |= {"eval_strategy": "steps", "eval_steps": every, "greater_is_better": True, **best}
        if base.four_bit:
            new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # the name from 5.24 on
            prefix = "activation" if new else "gradient"
            given |= {f"{prefix}_checkpointing": True, f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
        try:
            return TrainingArguments(output_dir=str(output), **{**given, **self.config})
        except (TypeError, ValueError) as error:
            raise ValueError(f"transformers refuses the training's arguments: {error}") from error


@dataclass(frozen=True)
class Outcome:
    """What a run left: `steps` trained, the `best` of them, numbers by way, trained parameters."""

    steps: int
    best: int | None
    numbers: dict[str, dict[str, Any]]
    parameters: int


def finetune(
    base: Base,
    tokenizer: Any,
    rows: Tokenized,
    output: Path,
    settings: Finetuning,
    evaluated: Tokenized | None = None,
    *,
    resume: bool = False,
    note: Mapping[str, Any] | None = None,
) -> Outcome | None:
    """Train on `rows` into the folder `output`; None in all processes but the first.

    Parameters
    ----------
    base, settings
        The model, and the run.
    tokenizer : PreTrainedTokenizerBase
        That the rows were tokenized with; gets the gist tokens.
    rows, evaluated : Tokenized
        To train on, and to answer during and after training.
    output : Path
        Gets checkpoints, log.jsonl, and at the end the model that answered best.
    resume : bool
        Go on from the newest whole checkpoint.
    note : mapping, optional
        What else the run depends on (which data), kept beside the settings and compared when it is resumed.

    Raises
    ------
    ValueError
        If the folder is in use, or there is nothing to resume, or that was another run.
    KeyboardInterrupt
        At Ctrl-C, saying how to go on.
    """
    settings.check()
    state = PartialState(cpu=not torch.cuda.is_available())
    written = json.loads(json.dumps({"base": asdict(base), "run": asdict(settings), **(note or {})}))
    checkpoint = _resumed(output, written) if resume else None
    if not resume:
        _check_unused(output)
    state.wait_for_everyone()  # all have looked before the first one writes
    if state.is_main_process and not resume:
        output.mkdir(parents=True, exist_ok=True)
        (output / SETTINGS).write_text(json.dumps(written, indent=1), "utf-8")
    arguments = settings.arguments(output, base, len(rows.features), evaluated is not None)
    model, handle = base.made(tokenizer, settings.role)
    handle.record(chat=settings.role or False)
    collator = GistDataCollator(
        tokenizer,
        handle,
        settings.segment_length,
        settings.segment_overlap,
        teacher=settings.objectives.distillation > 0,
        cue=CUE if settings.objectives.reconstruction else None,
    )
    answers = None
    if evaluated is not None:
        answers = AnswerEvaluation(settings.eval_samples, evaluated.longest_answer, text_metrics(tokenizer), "f1")
    trainer = GistTrainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=rows.features,
        eval_dataset=None if evaluated is None else evaluated.features[: settings.eval_samples],
        processing_class=tokenizer,
        objectives=settings.objectives,
        answers=answers,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar())
    trainer.add_callback(_EvaluateTheLast())
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(output)) from None
    trainer.save_model(str(output))
    if state.is_main_process:
        (output / "training_args.bin").unlink(missing_ok=True)  # a pickle; training.json says the same
    sharded, trained = trainer.is_fsdp_enabled, trainer.state
    parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
    del trainer  # a DistributedDataParallel that outlives its process group can wait for it for ever
    gc.collect()
    state.wait_for_everyone()
    is_main = state.is_main_process
    state.destroy_process_group()  # what follows is for the first process alone
    if not is_main:
        return None
    numbers = {}
    if evaluated is not None and not sharded:
        asked = evaluated.first(settings.eval_samples)
        how: dict[str, Any] = {"role": settings.role, "batch": arguments.per_device_eval_batch_size}
        with tqdm(total=len(WAYS) * len(asked.features), desc="answering", unit="answer", leave=False) as bar:
            try:
                found = answered(model, tokenizer, asked, collator, progress=bar.update, **how)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{output} is trained and saved; `gistkern eval` measures it") from None
        numbers = {one.way: one.summary() for one in found}
    best = trained.best_model_checkpoint
    step = int(Path(best).name.removeprefix("checkpoint-")) if best else None
    return Outcome(trained.global_step, step, numbers, parameters)


def _check_unused(output: Path) -> None:
    found = {path.name for path in output.iterdir()} if output.exists() else set()
    if found - _WRITTEN_FIRST:
        raise ValueError(f"{output} is in use: pass --resume to go on with its run, or another --output")


def _resumed(output: Path, written: dict[str, Any]) -> Path:
    checkpoint, file = newest_whole(output), output / SETTINGS
    if checkpoint is None or not file.is_file():
        raise ValueError(f"nothing to resume: {output} holds no whole checkpoint; leave --resume out to start")
    found = json.loads(file.read_text("utf-8"))
    flat, before = _flat(written), _flat(found)
    if different := [name for name in {**before, **flat} if flat.get(name) != before.get(name)]:
        said = ", ".join(f"{name} {before.get(name)!r}, now {flat.get(name)!r}" for name in different)
        raise ValueError(f"{output} is a run of other settings or rows ({said}): pass the same, or another --output")
    return checkpoint


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            found[name] = value
    return found


def _how_to_go_on(output: Path) -> str:
    if (whole := newest_whole(output)) is not None:
        return f"{whole} is whole, and the same command with --resume goes on from there"
    return f"{output} holds no whole checkpoint yet: the same command starts again"


class _EvaluateTheLast(TrainerCallback):
    """The last step may be the best one, also where it is no multiple of the others."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class _Bar(ProgressCallback):
    """transformers' bar, with the loss behind it and a line for each evaluation."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")
        if "eval_loss" in logs:
            names = ("exact", "contained", "f1", "token_accuracy")
            found = [(name, logs.get(f"eval_generation_{name}")) for name in names]
            said = ", ".join(f"{name} {value:.3f}" for name, value in found if value is not None)
            self.training_bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f}, {said}")
