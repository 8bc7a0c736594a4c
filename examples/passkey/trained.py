"""What a run left, opened: `open_trained` of a run's folder or any of its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from gistkern import GistHandle, patch_llama
from passkey.models import base_model, loading, patched, read_tokenizer
from passkey.niah import Sample, dataset
from passkey.readers import Reader
from passkey.settings import EvaluationRow, Settings, read_settings

__all__ = ["SETTINGS", "Trained", "newest", "newest_whole", "open_trained", "progress_of"]

SETTINGS = "settings.json"
STATE = "trainer_state.json"
# transformers draws a bar for every file and reports the gist rows, which patching reads, as unexpected keys
logging.disable_progress_bar()
logging.set_verbosity_error()


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be asked."""

    checkpoint: Path  # a folder of transformers' or peft's
    settings: Settings  # of its run
    model: PreTrainedModel  # patched, in evaluation mode; an adapter is merged into it unless it is quantized
    tokenizer: PreTrainedTokenizerBase
    handle: GistHandle

    @cached_property
    def about(self) -> dict[str, Any]:
        """For reports: preset, checkpoint, seed, and what the training took."""
        progress = progress_of(self.checkpoint)
        return {
            "preset": self.settings.name,
            "checkpoint": self.checkpoint.name,
            "seed": self.settings.seed,
            "training": {name: progress[name] for name in ("steps", "tokens", "cpu_seconds")},
        }

    @property
    def compression(self) -> dict[str, int]:
        """Arguments of `gistkern.compress`."""
        given = asdict(self.settings.segments)
        return {} if given["segment_length"] is None else given

    @property
    def start(self) -> list[int]:
        """Ids that the tokenizer puts in front of every context."""
        return self.tokenizer("")["input_ids"]

    def full(self) -> PreTrainedModel:
        """The model to compare with, whole contexts in sight: unpatched, and a pretrained one as it was."""
        if self.settings.model.name:
            return base_model(self.settings).eval()
        trained = open_trained(self.checkpoint)
        trained.handle.unpatch()
        return trained.model

    def reader(self, new_tokens: int | None = None) -> Reader:
        """Reads from gist rows."""
        return Reader(self.model, self.tokenizer.backend_tokenizer, self.compression, new_tokens, self.start)

    def full_reader(self, new_tokens: int | None = None) -> Reader:
        """Reads with the whole context in sight."""
        return Reader(self.full(), self.tokenizer.backend_tokenizer, {}, new_tokens, self.start, full=True)

    def datasets(self, seed: int, rows: Sequence[EvaluationRow] | None = None) -> list[list[Sample]]:
        """Held-out questions, row by row: those of the settings, or others."""
        asked = {"seed": seed, "asked_by": self.settings.data.asked_by}
        backend = self.tokenizer.backend_tokenizer
        rows = tqdm(rows or self.settings.evaluation, desc="making questions", disable=None, leave=False)
        return [list(dataset(backend, **asdict(row), **asked)) for row in rows]


def open_trained(path: str | Path, source: str | None = None) -> Trained:
    """Open a checkpoint of train_niah.py, or the newest whole one of a run's folder; ValueError if there is none.

    `source` is a folder or hub name of an adapter's base model, by default the run's.
    """
    checkpoint = newest(Path(path))
    file = next((one / SETTINGS for one in (checkpoint, checkpoint.parent) if (one / SETTINGS).is_file()), None)
    if file is None:
        raise ValueError(f"{checkpoint} belongs to no run: no {SETTINGS} in it or above it")
    settings = read_settings(file)
    if source is not None and settings.lora is None:
        raise ValueError(f"a base model is for adapters, {checkpoint} is a whole model: leave --model out")
    settings = settings.on(source, str(checkpoint))
    if settings.lora is None:
        tokenizer = read_tokenizer(checkpoint)
        with loading(checkpoint, "model"):
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
            handle = patch_llama(model, tokenizer)
    else:
        from peft import PeftModel

        base, handle, tokenizer = patched(settings)
        with loading(checkpoint, "model"):
            model = PeftModel.from_pretrained(base, checkpoint)
        if not settings.quantization:
            model = model.merge_and_unload()
    return Trained(checkpoint, settings, model.eval(), tokenizer, handle)


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end, or None: the Trainer writes its state last."""
    whole = [path for path in run.glob("checkpoint-[0-9]*") if (path / STATE).is_file()]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def newest(path: Path) -> Path:
    """A checkpoint's folder, or a run's newest; ValueError if there is none."""
    found = path if (path / STATE).is_file() else newest_whole(path)
    if found is None:
        raise ValueError(f"{path} holds no checkpoint: pass a folder that train_niah.py wrote")
    return found


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """Steps, tokens of the training's streams, processor seconds (of the main process) and whether it is finished."""
    file = checkpoint / STATE
    try:
        state = json.loads(file.read_text())
        callback = state["stateful_callbacks"]["GistCallback"]["attributes"]
        return {
            "steps": state["global_step"],
            "tokens": state["num_input_tokens_seen"],
            "cpu_seconds": round(callback["cpu_seconds"]),
            "finished": callback["curriculum"]["finished"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is none that train_niah.py wrote: {error}") from error
