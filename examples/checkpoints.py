"""Checkpoints of a training run: safetensors and JSON only, whole or not there at all.

A checkpoint folder is an ordinary transformers checkpoint (gist rows and settings included), or a peft adapter of a
pretrained model, with the tokenizer, the optimizers' state and the trainer's counters beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel
from transformers.utils import logging

from gistkern import GistHandle
from models import Model, read
from optimizer import Optimizers
from presets import Preset, preset
from ranks import whole_tensor
from results import newest_whole, read_json

__all__ = ["Progress", "latest", "load_model", "load_progress", "newest", "recipe_of", "save"]

KEEP = 2

# transformers draws a bar for every file and reports the gist rows, which patching reads, as unexpected keys
logging.disable_progress_bar()
logging.set_verbosity_error()


@dataclass
class Progress:
    """Where a run stands and what it has cost. Batches follow from seed and step alone: no generator state is needed.

    `tokens` are rows of the training streams as they were computed (rows that samples share count once per process and
    micro-batch), `cpu_seconds` those of all threads together.
    """

    preset: str
    seed: int
    tokens: int = 0
    cpu_seconds: float = 0.0
    curriculum: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Preset:
        """The preset of the run."""
        return preset(self.preset.removesuffix("-leak"), self.preset.endswith("-leak"))


def save(
    run: Path, model: Model, tokenizer: Tokenizer, optimizers: Optimizers, progress: Progress, is_main: bool = True
) -> None:
    """Write ``run/checkpoint-<step>`` in one step and drop all but the newest few.

    Every process of a run calls it, since a sharded model is put together by all; the main one writes.
    """
    weights, states = _weights(model, is_main), optimizers.tensors(is_main)
    if not is_main:
        return
    target = run / f"checkpoint-{progress.curriculum['step']:06d}"
    temporary = run / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save(str(temporary / "tokenizer.json"))
    save_file(states, temporary / "optimizer.safetensors")
    (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=2))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    for old in _all(run)[:-KEEP]:
        shutil.rmtree(old)


def _weights(model: Model, keep: bool) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model, put together one by one; nothing unless it is to `keep` them."""
    whole = isinstance(model, PreTrainedModel)  # of an adapter's model only what is trained is written
    once = {name for name, parameter in model.named_parameters() if whole or parameter.requires_grad}  # tied ones once
    once |= {name for name, _ in model.named_buffers()}
    found = {}
    for name, value in model.state_dict().items():
        if name in once:
            value = whole_tensor(value)
            if keep:
                found[name] = value
    return found


def _all(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"))


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return (_all(run) or [None])[-1]


def newest(path: Path) -> Path:
    """A checkpoint's folder, or a run's newest, be it of a preset or of transformers' Trainer; ValueError if none."""
    found = newest_whole(path) or path
    if not any((found / name).exists() for name in ("progress.json", "adapter_config.json")):
        raise ValueError(f"{path} holds no checkpoint: pass a folder that train_niah.py wrote")
    return found


def recipe_of(path: Path) -> Path | None:
    """recipe.json of a run of configs/, from the run's folder or that of an adapter in it; None for a preset."""
    return next((file for folder in (path, path.parent) if (file := folder / "recipe.json").exists()), None)


def load_model(path: Path, trainable: bool = False) -> tuple[PreTrainedModel, GistHandle, Tokenizer]:
    """Model, its gist handle and tokenizer of a checkpoint; ValueError if the folder holds none.

    An adapter is merged into its model unless it is to be `trainable`.
    """
    return read(path, load_progress(path).settings, trainable)


def load_progress(path: Path) -> Progress:
    """The counters of a checkpoint; ValueError if the folder holds none, or others than a run writes."""
    file = path / "progress.json"
    if not file.exists():
        raise ValueError(f"{path} holds no checkpoint (no progress.json): pass a folder that train_niah.py wrote")
    found = read_json(file, "preset", "seed", "curriculum")
    try:
        progress = Progress(**found)
        kinds = {"preset": str, "seed": int, "tokens": int, "cpu_seconds": (int, float), "curriculum": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(progress, name), kind):
                raise TypeError(f"{name} is {getattr(progress, name)!r}")
        progress.curriculum["step"] + 0
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is none that train_niah.py wrote: {error}") from error
    return progress
