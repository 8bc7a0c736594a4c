"""A trained model, ready to be asked, and what its report says about it: the same for presets and recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from checkpoints import load_model, load_progress
from gistkern import GistHandle
from models import full_context
from passkey.niah import Sample, dataset
from passkey.readers import FullReader, GistReader
from presets import Preset, Row

__all__ = ["Opened", "open_preset"]

SWAPPED = 20


@dataclass(frozen=True)
class Opened:
    """What a checkpoint holds.

    Parameters
    ----------
    about : mapping
        Of the report: preset, checkpoint, seed, training.
    model, handle, tokenizer
        The patched model, in evaluation mode.
    full : callable
        Makes the model to compare with, the whole context in sight.
    grid : tuple of Row
        Its own held-out questions, asked as `asked_by` says.
    compression : mapping
        Arguments of `gistkern.compress`.
    start : sequence of int
        Ids in front of every context.
    preset : (Path, Preset), optional
        Checkpoint and settings of a preset, which measuring beside the full cache loads again.
    """

    about: Mapping[str, Any]
    model: LlamaForCausalLM
    handle: GistHandle
    tokenizer: Tokenizer
    full: Callable[[], LlamaForCausalLM]
    grid: tuple[Row, ...]
    asked_by: str
    compression: Mapping[str, int]
    start: Sequence[int] = ()
    preset: tuple[Path, Preset] | None = None

    def reader(self, new_tokens: int | None = None) -> GistReader:
        """Reads from gist rows."""
        return GistReader(self.model, self.tokenizer, self.compression, new_tokens, self.start)

    def full_reader(self, new_tokens: int | None = None) -> FullReader:
        """Reads with the whole context in sight."""
        return FullReader(self.full().eval(), self.tokenizer, new_tokens, self.start)

    def datasets(self, seed: int) -> list[list[Sample]]:
        """The questions of each row of the grid."""
        return [self._dataset(seed, *row) for row in self.grid]

    def probe(self, seed: int) -> list[Sample]:
        """Other questions of the grid's longest contexts, for the swap test."""
        language, tokens, *_ = max(self.grid, key=lambda row: row[1])
        return self._dataset(seed, language, tokens, SWAPPED)

    def _dataset(self, seed: int, language: str, tokens: int, count: int, *rest: str) -> list[Sample]:
        options = dict(zip(("filler", "wordings"), rest, strict=False))
        return list(dataset(self.tokenizer, language, tokens, count, seed=seed, asked_by=self.asked_by, **options))


def open_preset(checkpoint: Path) -> Opened:
    """A checkpoint of train_niah.py; ValueError if the folder holds none."""
    progress = load_progress(checkpoint)
    settings = progress.settings
    model, handle, tokenizer = load_model(checkpoint)
    cost = {"steps": progress.curriculum["step"], "tokens": progress.tokens, "cpu_seconds": round(progress.cpu_seconds)}
    return Opened(
        about={"preset": settings.name, "checkpoint": checkpoint.name, "seed": progress.seed, "training": cost},
        model=model.eval(),
        handle=handle,
        tokenizer=tokenizer,
        full=lambda: full_context(checkpoint, settings),
        grid=settings.evaluate,
        asked_by=settings.asked_by,
        compression=settings.segments,
        preset=(checkpoint, settings),
    )
