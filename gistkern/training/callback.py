"""`GistCallback`: the curriculum saved and resumed with the checkpoints, and a log that a person can watch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback

from gistkern.training.curriculum import Curriculum
from gistkern.training.interrupt import Interrupt

__all__ = ["GistCallback"]


class GistCallback(TrainerCallback, ExportableState):
    """Writes every log entry as a line of JSON, and carries a curriculum through training, checkpoints and resume.

    `GistTrainer` adds one by itself. With another Trainer it can be passed for the log alone.

    The curriculum's state is part of a checkpoint's trainer_state.json, and comes back with
    ``trainer.train(resume_from_checkpoint=...)``, with the processor seconds (of all threads of this process) that the
    training has taken. Training ends when the curriculum is finished, with a checkpoint.

    Parameters
    ----------
    curriculum : Curriculum, optional
        Told the accuracy of each step; read by the data set.
    log_file : str, optional
        Inside the output folder; None writes none. A fresh run starts it afresh, a resumed one drops the entries
        after its checkpoint. Only the first process writes.

    Attributes
    ----------
    accuracy : float or None
        Of the step just made, over all processes; set by the trainer.
    interrupt : Interrupt or None
        Set by the trainer: asked after every step whether to save and end.
    saved_at_interrupt : str or None
        The checkpoint that an interrupt left; None if there was none, or training was over with that step.

    Examples
    --------
    >>> from gistkern.training import Curriculum, GistCallback, Stage
    >>> callback = GistCallback(Curriculum([Stage(steps=100, tokens=(50, 60))]))
    >>> callback.state()["attributes"]["curriculum"]["step"]  # goes into every checkpoint
    0
    """

    def __init__(self, curriculum: Curriculum | None = None, log_file: str | None = "log.jsonl") -> None:
        self.curriculum = curriculum
        self.log_file = log_file
        self.accuracy: float | None = None
        self.interrupt: Interrupt | None = None
        self.saved_at_interrupt: str | None = None
        self._cpu_seconds = 0.0

    def state(self) -> dict[str, Any]:
        """What transformers writes into trainer_state.json."""
        state = None if self.curriculum is None else self.curriculum.state_dict()
        return {"args": {}, "attributes": {"curriculum": state, "cpu_seconds": self._cpu_seconds + time.process_time()}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the curriculum of a checkpoint, and take back the log to where it was written."""
        self.saved_at_interrupt = None
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        attributes = saved["attributes"] if isinstance(saved, dict) else {}
        self._cpu_seconds = attributes.get("cpu_seconds", 0.0) - time.process_time()
        if state.global_step and self.curriculum is not None:
            self._restore(attributes.get("curriculum"))
        if self.log_file is not None and state.is_world_process_zero:
            path = Path(args.output_dir) / self.log_file
            path.parent.mkdir(parents=True, exist_ok=True)
            # an entry is written after its step
            path.write_text(_entries_before(path, state.global_step + 1) if state.global_step else "")

    def _restore(self, found: Any) -> None:
        if found is None or self.curriculum is None:
            raise ValueError(
                "the checkpoint holds no state of a curriculum: it was written without one; resume without one, or "
                "start the curriculum with a fresh run"
            )
        self.curriculum.load_state_dict(found)
        if self.curriculum.finished:
            raise ValueError("nothing to resume: the checkpoint's curriculum is finished")

    def on_step_end(self, args, state, control, **kwargs):
        """Tell the curriculum the accuracy of the step; save and end where Ctrl-C was pressed."""
        if self.curriculum is not None:
            if self.accuracy is None:
                raise ValueError(
                    "a curriculum needs the accuracy of each step, which GistTrainer measures: train with it"
                )
            self.curriculum.update(self.accuracy)
            self.accuracy = None
            if self.curriculum.finished:
                control.should_training_stop = True
                control.should_save |= args.save_strategy != "no"  # as at max_steps, which a gate may have saved
        if self.interrupt is not None and self._interrupted_anywhere(args):
            if not control.should_training_stop:
                self.saved_at_interrupt = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            control.should_save = control.should_training_stop = True

    def _interrupted_anywhere(self, args) -> bool:
        """Whether a process of the run was: all save, and end, after the same step."""
        assert self.interrupt is not None
        requested = torch.tensor(float(self.interrupt.requested), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(requested)
        return bool(requested)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append a line."""
        if self.log_file is not None and state.is_world_process_zero:
            with (Path(args.output_dir) / self.log_file).open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _entries_before(path: Path, step: int) -> str:
    """The lines of a log below `step`, at which a run goes on and will write its own.

    A line torn by a kill ends the log; a file that is not there is an empty one.
    """
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] < step:
            kept.append(line + "\n")
    return "".join(kept)
