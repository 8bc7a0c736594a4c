"""Training gist tokens: objectives, curriculum, collator and Trainer (docs/training.md). Loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

# public name -> module: the curriculum and the objectives need no Trainer, nor accelerate
_EXPORTS = {
    "Curriculum": "gistkern.training.curriculum",
    "GistCallback": "gistkern.training.callback",
    "GistDataCollator": "gistkern.training.collator",
    "GistTrainer": "gistkern.training.trainer",
    "Objectives": "gistkern.training.objectives",
    "Share": "gistkern.training.steps",
    "Stage": "gistkern.training.curriculum",
    "StepDataset": "gistkern.training.steps",
    "answer_loss": "gistkern.training.objectives",
    "distillation_loss": "gistkern.training.objectives",
    "ignore_gist_labels": "gistkern.training.labels",
    "reconstruction_loss": "gistkern.training.objectives",
    "unlabeled": "gistkern.training.steps",
}

__all__ = [
    "Curriculum",
    "GistCallback",
    "GistDataCollator",
    "GistTrainer",
    "Objectives",
    "Share",
    "Stage",
    "StepDataset",
    "answer_loss",
    "distillation_loss",
    "ignore_gist_labels",
    "reconstruction_loss",
    "unlabeled",
]

if TYPE_CHECKING:
    from gistkern.training.callback import GistCallback
    from gistkern.training.collator import GistDataCollator
    from gistkern.training.curriculum import Curriculum, Stage
    from gistkern.training.labels import ignore_gist_labels
    from gistkern.training.objectives import Objectives, answer_loss, distillation_loss, reconstruction_loss
    from gistkern.training.steps import Share, StepDataset, unlabeled
    from gistkern.training.trainer import GistTrainer


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gistkern.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
