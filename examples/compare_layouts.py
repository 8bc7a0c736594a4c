"""The grid of compare.py: the configurations that are compared, and the budget that each of them gets.

One axis at a time leaves the base (one segment, 10 gists, ``gist_first`` positions, no sink); the axes that change
how a layout extrapolates, positions and sink, are varied for every layout.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gistkern import GistHandle, patch_llama
from gistkern.training import GistDataCollator, Stage
from passkey.models import random_llama
from passkey.niah import Haystack
from passkey.settings import preset_file, read_settings

__all__ = ["BUDGETS", "CAPACITY", "GIST_COUNTS", "GRID", "LAYOUTS", "Budget", "Configuration", "draw_batch", "feature"]

LAYOUTS = ("single", "segment-wise", "hierarchical")
GIST_COUNTS = (1, 2, 5, 10, 25)
SEGMENT_LENGTH, SEGMENT_OVERLAP = 96, 24
SEGMENT_GISTS = 8  # of a hierarchical layout, whose summary the configuration's gists are


@dataclass(frozen=True)
class Budget:
    """What every configuration of a task gets, the same for all.

    Parameters
    ----------
    stages : tuple of Stage
        Lengths and keys of the training contexts. A stage ends at its gate, at the latest after `patience` times its
        steps; the last one takes what is left of the budget.
    rows : int
        Rows of all training streams together: context (what overlaps twice), gists, question, answer and padding.
    step_rows : int
        Rows of one optimiser step: a step holds as many contexts as fit, at least one.
    learning_rate : float
        Of a step of 32 contexts; scales with the square root of their number. It rises over `warmup_steps` and falls
        to a fiftieth over the last `decay` of the rows.
    evaluate : tuple of int
        Tokens of the evaluation's contexts, or with `keys` of all of them.
    samples : int
        Contexts per evaluated length, or number of keys.
    keys : tuple of int
        Keys per evaluated context of the capacity task, all of them asked; empty for the task of one key.
    """

    stages: tuple[Stage, ...]
    rows: int
    evaluate: tuple[int, ...]
    samples: int
    keys: tuple[int, ...] = ()
    step_rows: int = 2800
    patience: float = 10.0
    smoothing: float = 0.95
    learning_rate: float = 4e-3
    muon_factor: float = 3.0
    adamw_factor: float = 2.0
    adamw_betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 50
    decay: float = 0.3
    language: str = "en"


def _stage(least: int, most: int, steps: int, gate: float = 0.0, keys: tuple[int, int] = (1, 1)) -> Stage:
    return Stage(tokens=(least, most), steps=steps, gate=gate, keys=keys)


# the first stage is long: until the copying circuit has formed, longer contexts teach nothing
_ONE_KEY = Budget(
    stages=(
        _stage(42, 56, 40, gate=0.85),
        _stage(70, 96, 20, gate=0.85),
        _stage(100, 200, 20, gate=0.85),
        _stage(100, 400, 1),
    ),
    rows=2_400_000,
    evaluate=(100, 200, 400, 800, 1600),
    samples=100,
)
_NAMED_KEYS = Budget(
    stages=(
        _stage(42, 56, 40, gate=0.85),
        _stage(88, 100, 40, gate=0.8, keys=(1, 2)),
        _stage(160, 200, 40, gate=0.8, keys=(1, 4)),
        _stage(310, 320, 1, keys=(1, 8)),
    ),
    rows=4_800_000,
    evaluate=(320,),
    samples=50,
    keys=(1, 2, 4, 8),
)
# seconds instead of minutes, for the tests and a first look: it learns nothing
_SMOKE_STAGES = (_stage(42, 56, 1, gate=0.5), _stage(100, 120, 1))
BUDGETS: dict[str, dict[str, Budget]] = {
    "standard": {"one key": _ONE_KEY, "named keys": _NAMED_KEYS},
    "smoke": {
        "one key": Budget(_SMOKE_STAGES, rows=2000, evaluate=(60, 200), samples=4, step_rows=400, patience=2),
        "named keys": Budget(
            (_stage(88, 96, 1, keys=(1, 2)),), rows=1000, evaluate=(90,), samples=3, keys=(1, 2), step_rows=400
        ),
    },
}


@dataclass(frozen=True)
class Configuration:
    """One cell of the grid. `gists` are those that close a context or a segment, or the summary's."""

    layout: str = "single"
    gists: int = 10
    positions: str = "gist_first"
    sink_tokens: int = 0
    task: str = "one key"

    @property
    def name(self) -> str:
        """What `--only` takes."""
        parts = [self.layout, str(self.gists)]
        if self.positions != "gist_first":
            parts.append(self.positions)
        if self.sink_tokens:
            parts.append("sink")
        if self.task != "one key":
            parts.append("keys")
        return "-".join(parts)

    @property
    def compression(self) -> dict[str, int]:
        """Arguments of `gistkern.compress`, and of the collator."""
        if self.layout == "single":
            return {}
        return {"segment_length": SEGMENT_LENGTH, "segment_overlap": SEGMENT_OVERLAP}

    def build(self, seed: int) -> GistHandle:
        """The tiny model before its training, patched."""
        return patch_llama(
            random_llama(read_settings(preset_file("tiny"), seed)),
            num_gist_tokens=self.gists,
            num_segment_gist_tokens=SEGMENT_GISTS if self.layout == "hierarchical" else 0,
            positions=self.positions,
            sink_tokens=self.sink_tokens,
        )


def _grid() -> tuple[Configuration, ...]:
    """Every configuration once, the most telling first: a grid that is cut short has compared the layouts."""
    cells = [Configuration(layout) for layout in LAYOUTS]
    cells += [Configuration("single", gists) for gists in GIST_COUNTS]
    cells += [Configuration(layout, positions="absolute") for layout in LAYOUTS]
    cells += [Configuration(layout, sink_tokens=1) for layout in LAYOUTS]
    cells += [Configuration(layout, gists) for gists in GIST_COUNTS for layout in LAYOUTS]
    cells += [Configuration("single", gists, task="named keys") for gists in GIST_COUNTS]
    return tuple(dict.fromkeys(cells))


GRID = _grid()
CAPACITY = tuple(cell for cell in GRID if cell.task == "named keys")


def feature(haystack: Haystack, tokens: int, keys: int) -> dict[str, list[int]]:
    """A training sample of an exact length, as `GistDataCollator` takes it."""
    ids, sample = haystack.draw(tokens, keys=keys)
    return {
        "context_ids": ids,
        "question_ids": haystack.encode(sample.question),
        "answer_ids": haystack.encode(sample.answer),
    }


def draw_batch(
    haystack: Haystack, collate: GistDataCollator, stage: Stage, step_rows: int, rng: random.Random
) -> tuple[Mapping[str, Any], torch.Tensor]:
    """A batch of contexts of one length and number of keys, and their answers' ids ``[contexts, digits]``.

    It holds about `step_rows` rows, whatever the layout makes of a context.
    """
    assert stage.tokens is not None
    haystack.rng = rng
    tokens, keys = rng.randint(*stage.tokens), rng.randint(*stage.keys)
    first = feature(haystack, tokens, keys)
    rows = collate([first])["input_ids"].shape[1]
    features = [first, *(feature(haystack, tokens, keys) for _ in range(step_rows // rows - 1))]
    batch = collate(features)
    return batch, torch.tensor([one["answer_ids"] for one in features])
