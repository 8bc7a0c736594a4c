"""The bar of a training that is watched at a terminal, with a line for each evaluation wherever it runs."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback

from gistkern.progress import bar

__all__ = ["TrainingBar"]

_NAMES = ("exact", "contained", "f1", "token_accuracy")


class TrainingBar(ProgressCallback):
    """transformers' bars, with the loss behind them; none in files and pipes, where they would be a line a step."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin where a resumed run does."""
        if state.is_world_process_zero:
            self.training_bar = bar(total=state.max_steps, initial=state.global_step, desc="training", leave=True)
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, eval_dataloader: Any = None, **kwargs):
        """Count the batches whose loss is measured."""
        if state.is_world_process_zero:
            shown = self.prediction_bar or bar(total=len(eval_dataloader), desc="held-out loss")
            shown.update(1)
            self.prediction_bar = shown

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show the loss, and write what an evaluation found."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")
        if "eval_loss" in logs:
            found = [(name, logs.get(f"eval_generation_{name}")) for name in _NAMES]
            said = ", ".join(f"{name} {value:.3f}" for name, value in found if value is not None)
            self.training_bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f}, {said}")
