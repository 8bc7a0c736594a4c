"""`GistTrainer`: transformers' Trainer with gist tokens' losses, measures, checkpoints and curriculum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset
from transformers import EvalPrediction, Trainer

from gistkern.hf.handle import handle_of
from gistkern.progress import bar
from gistkern.training.callback import GistCallback
from gistkern.training.collator import GistDataCollator
from gistkern.training.curriculum import Curriculum
from gistkern.training.generation import AnswerEvaluation, Generated, generate_answers, generation_metrics
from gistkern.training.interrupt import Interrupt
from gistkern.training.objectives import Losses, Objectives
from gistkern.training.steps import Share, StepDataset
from gistkern.training.streams import IGNORED

__all__ = ["GistTrainer", "answer_metrics"]


class GistTrainer(Trainer):
    """transformers' Trainer for a patched model and a `GistDataCollator`; takes all that a Trainer takes.

    - Losses: the weighted `objectives`; logits of the answer only. Sums over tokens are divided by the number of
      tokens of the whole step, all micro-batches and processes together, as the Trainer does for its own loss.
    - Logs: each objective by name, `exact` (answers with every token right, under teacher forcing) and
      `token_accuracy`, over all that was trained on since the last entry; and the curriculum. They go wherever
      `report_to` says, and to log.jsonl in the output folder.
    - Evaluation: the answer's loss, and `eval_exact` and `eval_token_accuracy` unless `compute_metrics` is given;
      a `compute_metrics` of your own gets logits ``[n, T, vocabulary]`` and the labels ``[n, T]`` that they predict.
      `evaluate_generation` lets the model answer from its gist rows alone; with `answers` every evaluation does, and
      `metric_for_best_model="generation_best"` keeps the checkpoint that answers best.
    - Checkpoints: transformers' own. With peft that is the adapter, which holds the gist rows, and beside it
      gistkern.json: the settings to patch a fresh base model with, and what contexts began with (BOS).
    - Ctrl-C: `train` ends the step, saves a checkpoint, whatever `save_strategy` says, and raises KeyboardInterrupt
      with the call that goes on from there. A second Ctrl-C stops at once.

    Parameters
    ----------
    *args, **kwargs
        Of `transformers.Trainer`.
    objectives : Objectives, optional
        By default the answer alone. Training only.
    curriculum : Curriculum, optional
        Fed with the accuracy of each step, the same on every process. Your data set reads it; batches that are loaded
        ahead still come from the stage before, so let it be a `StepDataset`, of which none are.
    log_file : str, optional
        See `GistCallback`.
    answers : AnswerEvaluation, optional
        What each evaluation also generates, logged as `eval_generation_exact` and so on.

    Raises
    ------
    ValueError
        If the model is not patched, its mask is off or its adapter would lose the gist rows; for arguments that
        this trainer would ignore (`compute_loss_func`, `label_smoothing_factor`) or cannot serve (DataParallel,
        data workers that would not see the curriculum move, dispatched batches,
        `restore_callback_states_from_checkpoint`).

    Examples
    --------
    >>> from transformers import TrainingArguments
    >>> from gistkern.training import GistDataCollator, GistTrainer
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> rows = [{"context": "The bell is with Mira.", "question": " Who has it?", "answer": " Mira"}] * 4
    >>> trainer = GistTrainer(
    ...     model,
    ...     TrainingArguments("out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no"),
    ...     GistDataCollator(tokenizer, handle),
    ...     train_dataset=rows,
    ... )
    >>> output = trainer.train()
    {'train_runtime': ...}
    >>> output.global_step
    2
    """

    def __init__(
        self,
        *args: Any,
        objectives: Objectives | None = None,
        curriculum: Curriculum | None = None,
        log_file: str | None = "log.jsonl",
        answers: AnswerEvaluation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.answers = answers
        self.objectives = objectives or Objectives()
        self.curriculum = curriculum
        self._check(curriculum)
        if isinstance(self.data_collator, GistDataCollator):  # saved with the settings, and compared by who reads texts
            cut = self.data_collator.streams
            handle_of(self.model).record(
                context_prefix=self.data_collator.prefix,
                segment_length=cut.segment_length,
                segment_overlap=cut.segment_overlap,
            )
        self.gist_callback = GistCallback(curriculum, log_file)
        self.add_callback(self.gist_callback)
        if self.compute_metrics is None and not self.args.batch_eval_metrics:
            self.compute_metrics = answer_metrics
            self.preprocess_logits_for_metrics = _most_likely
        self._reconstruction_items: torch.Tensor | int | None = None
        self._step_counts: torch.Tensor | None = None
        self._window_parts: dict[str, Any] = {}
        self._window_counts: Any = 0
        self._window_steps = 0

    def _check(self, curriculum: Curriculum | None) -> None:
        handle_of(self.model).check_settings()
        arguments: Any = self.args
        refused = {
            "compute_loss_func would be ignored: pass objectives": self.compute_loss_func is not None,
            "label_smoothing_factor would be ignored: leave it at 0": arguments.label_smoothing_factor != 0,
            "several GPUs in one process (DataParallel) split batches but not their layouts: launch one process per "
            "GPU, with torchrun or accelerate": arguments.n_gpu > 1,
            "restore_callback_states_from_checkpoint would replace the callback that holds the curriculum, which is "
            "restored without it: leave it off": arguments.restore_callback_states_from_checkpoint,
            "GistTrainer adds a GistCallback itself: pass its curriculum and log_file to the trainer": any(
                isinstance(one, GistCallback) for one in self.callback_handler.callbacks
            ),
            "an IterableDataset over several processes would be read by the first and cut up for the others, which "
            "takes batches without layouts and of one width: pass accelerator_config={'dispatch_batches': False}": (
                arguments.world_size > 1
                and isinstance(self.train_dataset, IterableDataset)
                and arguments.accelerator_config.dispatch_batches is not False
            ),
            "a curriculum needs dataloader_num_workers=0: workers are copies that never see it move": curriculum
            is not None
            and arguments.dataloader_num_workers > 0,
            "a StepDataset has no length: set max_steps": (
                isinstance(self.train_dataset, StepDataset) and arguments.max_steps < 1
            ),
        }
        for message, applies in refused.items():
            if applies:
                raise ValueError(message)

    # ---- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`, in which Ctrl-C loses nothing."""
        with Interrupt() as self.gist_callback.interrupt:
            output = super().train(*args, **kwargs)
        if (folder := self.gist_callback.saved_at_interrupt) is not None:
            raise KeyboardInterrupt(f"saved {folder}: go on with trainer.train(resume_from_checkpoint={folder!r})")
        return output

    # ---- the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted objectives in training, the answer's loss in evaluation."""
        objectives = self.objectives if model.training else Objectives()
        losses = objectives(model, inputs, num_items_in_batch, self._reconstruction_items if model.training else None)
        # num_items_in_batch counts the tokens of all processes, whose gradients are then averaged
        shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes if shared else 1
        if model.training:
            self._measure(losses, scale)
        total = losses.total * scale
        return (total, {"logits": losses.tail.logits, "labels": losses.tail.labels}) if return_outputs else total

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step; the tokens to reconstruct are counted as transformers counts the labels."""
        if isinstance(data := self.train_dataset, StepDataset):
            processes, process = self.args.world_size, self.args.process_index
            shares = (Share(process + place * processes, num_batches * processes) for place in range(num_batches))
            epoch_iterator = iter([data.draw(self.state.global_step, share) for share in shares])
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        parts = [batch["reconstruction"] for batch in samples if "reconstruction" in batch]
        self._reconstruction_items = self._get_num_items_in_batch(parts, device)
        return samples, num_items

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, logits of the answers, and the labels that these predict (the columns of a batch are the same)."""
        inputs = self._prepare_inputs(inputs)
        items = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        return (loss, None, None) if prediction_loss_only else (loss, outputs["logits"], outputs["labels"])

    def evaluate_generation(
        self,
        eval_dataset: Any = None,
        *,
        max_new_tokens: int | None = None,
        compute_metrics: Callable[[Generated], dict[str, float]] = generation_metrics,
        metric_key_prefix: str = "generation",
    ) -> dict[str, float]:
        """Compress the contexts of a data set, answer its questions from the gist rows alone, and compare.

        Greedy, `per_device_eval_batch_size` samples at a time. `evaluate` tells the model the right tokens in front of
        each that it predicts; this is what a user of the model gets.

        Parameters
        ----------
        eval_dataset : Dataset, optional
            Of features as the `GistDataCollator` takes them; by default the trainer's.
        max_new_tokens : int, optional
            Most tokens of an answer; by default as many as the right one has, for models that were not trained to stop.
        compute_metrics : callable
            Makes named numbers of a `gistkern.training.generation.Generated`; by default `exact`, `contained` and
            `token_accuracy` (`generation_metrics`).
        metric_key_prefix : str
            Put in front of their names.

        Returns
        -------
        dict
            The metrics, the same on every process. They are also logged.

        Raises
        ------
        ValueError
            If there is no data set, the trainer has another collator, or FSDP shards the model.

        Examples
        --------
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from gistkern.training import GistDataCollator, GistTrainer
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                                      num_attention_heads=2, vocab_size=100))
        >>> collator = GistDataCollator(0, patch_llama(model, num_gist_tokens=2))
        >>> arguments = TrainingArguments(report_to="none", use_cpu=True, disable_tqdm=False)
        >>> trainer = GistTrainer(model, arguments, data_collator=collator)
        >>> asked = [{"context_ids": [5, 6, 7], "question_ids": [8], "answer_ids": [9, 1]}]
        >>> sorted(trainer.evaluate_generation(asked))
        ['generation_contained', 'generation_exact', 'generation_token_accuracy']
        """
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise ValueError("there is nothing to evaluate: pass eval_dataset, here or to the trainer")
        said = self._generated(data, len(data), max_new_tokens)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in compute_metrics(said).items()}
        self.log(dict(metrics))
        return metrics

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Also generate answers, where `answers` says so."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.answers is not None and description == "Evaluation":
            data: Any = dataloader.dataset
            found: Any = output.metrics
            said = self._generated(data, min(self.answers.samples, len(data)), self.answers.max_new_tokens)
            for name, value in self.answers.measured(said, found.get(f"{metric_key_prefix}_loss")).items():
                found[f"{metric_key_prefix}_generation_{name}"] = value
        return output

    def _generated(self, data: Any, samples: int, max_new_tokens: int | None) -> Generated:
        """What is said to the first `samples` of `data`, shared by all processes."""
        model: Any = self.model
        collator = self.data_collator
        if not isinstance(collator, GistDataCollator):
            raise ValueError(
                f"a GistDataCollator tells contexts from questions, the trainer has {type(collator).__name__}"
            )
        if self.is_fsdp_enabled:
            raise ValueError(
                "a model that FSDP shards cannot compress contexts: save it, and evaluate in a process alone"
            )
        index, count = self.args.process_index, self.args.world_size
        size, places, said = self.args.per_device_eval_batch_size, range(index, samples, count), Generated([], [])
        was_training = model.training
        model.eval()
        try:
            with bar(self.args.disable_tqdm, total=len(places), desc="answering", unit="answer") as progress:
                for begin in range(0, len(places), size):
                    features = [data[place] for place in places[begin : begin + size]]
                    with self.accelerator.autocast():
                        answers = generate_answers(model, collator, features, max_new_tokens)
                    said.predictions.extend(answers.predictions)
                    said.labels.extend(answers.labels)
                    progress.update(len(features))
        finally:
            model.train(was_training)
        if count > 1:
            parts = gather_object([(said.predictions, said.labels)])
            order = [divmod(place, count) for place in range(samples)]
            predictions, labels = ([parts[rank][kind][row] for row, rank in order] for kind in range(2))
            said = Generated(predictions, labels)
        return said

    # ---- measures and logs

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A micro-batch; after the last one of a step the curriculum hears how accurate it was."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._window_steps += 1
            if self.curriculum is not None:
                right, wanted, exact, answers = self.accelerator.reduce(self._step_counts, "sum").tolist()
                by_token = self.curriculum.measure == "token_accuracy"
                self.gist_callback.accuracy = right / wanted if by_token else exact / answers
            self._step_counts = None
        return loss

    def _measure(self, losses: Losses, scale: int) -> None:
        counts = losses.tail.counts()
        self._step_counts = counts if self._step_counts is None else self._step_counts + counts
        self._window_counts = self._window_counts + counts
        for name, value in losses.parts.items():
            self._window_parts[name] = self._window_parts.get(name, 0) + value * scale

    def log(self, logs, start_time=None):
        """Add the parts of the loss, the accuracies and the curriculum to a training entry."""
        if "loss" in logs and self._window_steps:
            parts = self.accelerator.reduce(torch.stack(list(self._window_parts.values())), "mean") / self._window_steps
            right, wanted, exact, samples = self.accelerator.reduce(self._window_counts, "sum").tolist()
            logs |= dict(zip(self._window_parts, parts.tolist(), strict=True))
            logs |= {"exact": exact / samples, "token_accuracy": right / wanted}
            self._window_parts, self._window_counts, self._window_steps = {}, 0, 0
            if self.curriculum is not None:
                logs |= {"stage": self.curriculum.index, "running_accuracy": self.curriculum.running_accuracy}
        super().log(logs, start_time)

    # ---- data and checkpoints

    def get_train_dataloader(self):
        """Of a `StepDataset` only numbers: its batches are drawn when their step begins."""
        if not isinstance(self.train_dataset, StepDataset):
            return super().get_train_dataloader()
        return DataLoader(range(self.args.max_steps * self.args.gradient_accumulation_steps))  # type: ignore[arg-type]

    def _set_signature_columns_if_needed(self):
        """The columns that `remove_unused_columns` keeps: the collator reads others than the model."""
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, GistDataCollator):
            columns: list[str] = self._signature_columns  # type: ignore[assignment]
            columns += [name for name in self.data_collator.fields if name not in columns]

    def save_model(self, output_dir=None, _internal_call=False):
        """transformers' checkpoint, and beside an adapter the settings that the base model is to be patched with."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and hasattr(self.model, "get_base_model"):
            path = Path(str(output_dir or self.args.output_dir)) / "gistkern.json"
            path.write_text(json.dumps(handle_of(self.model).arguments(), indent=2))


def answer_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`exact` and `token_accuracy` of predicted token ids ``[n, T]`` against the labels ``[n, T]``."""
    labels = np.asarray(prediction.label_ids)
    wanted = labels != IGNORED
    right = (np.asarray(prediction.predictions) == labels) & wanted
    return {"exact": float((right == wanted).all(1).mean()), "token_accuracy": float(right.sum() / wanted.sum())}


def _most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Token ids instead of logits, so that an evaluation holds a vocabulary less."""
    return logits.argmax(-1)
