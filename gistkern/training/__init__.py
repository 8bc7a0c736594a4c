"""Training gist tokens: objectives, curriculum, collator and Trainer (docs/guides/trainers.md). Loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gistkern.lazy import loaded_on_use

# public name -> module: the curriculum and the objectives need no Trainer, nor accelerate
_EXPORTS = {
    "AnswerEvaluation": "gistkern.training.generation",
    "Curriculum": "gistkern.training.curriculum",
    "GistCallback": "gistkern.training.callback",
    "GistDataCollator": "gistkern.training.collator",
    "GistTrainer": "gistkern.training.trainer",
    "Objectives": "gistkern.training.objectives",
    "Share": "gistkern.training.steps",
    "Stage": "gistkern.training.curriculum",
    "StepDataset": "gistkern.training.steps",
    "answer_loss": "gistkern.training.objectives",
    "curves_of": "gistkern.training.curves",
    "distillation_loss": "gistkern.training.objectives",
    "ignore_gist_labels": "gistkern.training.labels",
    "reconstruction_loss": "gistkern.training.objectives",
    "unlabeled": "gistkern.training.steps",
    "write_curves": "gistkern.training.curves",
}

__all__, __getattr__, __dir__ = loaded_on_use(__name__, _EXPORTS)

if TYPE_CHECKING:
    from gistkern.training.callback import GistCallback as GistCallback
    from gistkern.training.collator import GistDataCollator as GistDataCollator
    from gistkern.training.curriculum import Curriculum as Curriculum
    from gistkern.training.curriculum import Stage as Stage
    from gistkern.training.curves import curves_of as curves_of
    from gistkern.training.curves import write_curves as write_curves
    from gistkern.training.generation import AnswerEvaluation as AnswerEvaluation
    from gistkern.training.labels import ignore_gist_labels as ignore_gist_labels
    from gistkern.training.objectives import Objectives as Objectives
    from gistkern.training.objectives import answer_loss as answer_loss
    from gistkern.training.objectives import distillation_loss as distillation_loss
    from gistkern.training.objectives import reconstruction_loss as reconstruction_loss
    from gistkern.training.steps import Share as Share
    from gistkern.training.steps import StepDataset as StepDataset
    from gistkern.training.steps import unlabeled as unlabeled
    from gistkern.training.trainer import GistTrainer as GistTrainer
