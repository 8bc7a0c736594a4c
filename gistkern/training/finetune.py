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
from transformers import ProgressCallback, TrainerCallback, TrainingArguments

from gistkern.progress import announce, bar
from gistkern.training.answering import WAYS, answered
from gistkern.training.bars import TrainingBar
from gistkern.training.base import Base
from gistkern.training.checkpoints import SETTINGS, check_unused, how_to_go_on, step_of, to_resume
from gistkern.training.collator import GistDataCollator
from gistkern.training.generation import AnswerEvaluation
from gistkern.training.objectives import Objectives
from gistkern.training.rows import Tokenized
from gistkern.training.scores import text_metrics
from gistkern.training.trainer import GistTrainer

__all__ = ["Finetuning", "Outcome", "finetune"]

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
        Go on from the newest whole checkpoint, with as many steps as before or more: the learning rate then follows
        the longer schedule.
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
    checkpoint = to_resume(output, written) if resume else None
    if not resume:
        check_unused(output)
    arguments = settings.arguments(output, base, len(rows.features), evaluated is not None)
    longer = checkpoint is not None and json.loads((output / SETTINGS).read_text("utf-8")) != written
    if longer and checkpoint is not None and arguments.max_steps <= step_of(checkpoint):
        raise ValueError(
            f"{checkpoint} has made all {arguments.max_steps} steps: pass more --steps, or as many as before"
        )
    state.wait_for_everyone()  # all have looked before the first one writes
    if state.is_main_process and (longer or not resume):
        output.mkdir(parents=True, exist_ok=True)
        (output / SETTINGS).write_text(json.dumps(written, indent=1), "utf-8")
    announce(f"loading {base.name}{', to 4 bits' * base.four_bit}")
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
    trainer.add_callback(TrainingBar())
    trainer.add_callback(_EvaluateTheLast())
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(output)) from None
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
        with bar(total=len(WAYS) * len(asked.features), desc="answering", unit="answer") as shown:
            try:
                found = answered(model, tokenizer, asked, collator, progress=shown.update, **how)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{output} is trained and saved; `gistkern eval` measures it") from None
        numbers = {one.way: one.summary() for one in found}
    best = trained.best_model_checkpoint
    step = int(Path(best).name.removeprefix("checkpoint-")) if best else None
    return Outcome(trained.global_step, step, numbers, parameters)


class _EvaluateTheLast(TrainerCallback):
    """The last step may be the best one, also where it is no multiple of the others."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
