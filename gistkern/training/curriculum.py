"""A curriculum: stages of growing difficulty, each left when the measured accuracy passes its gate.

Starting small is Bengio et al. 2009, "Curriculum Learning"; the gate on measured accuracy replaces a schedule that
would have to be guessed anew for every model, seed and task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Curriculum", "Stage"]

MEASURES = ("token_accuracy", "exact")


@dataclass(frozen=True)
class Stage:
    """One step of a curriculum. Ranges are (least, most), both included.

    Parameters
    ----------
    steps : int
        Optimizer steps that the stage lasts at least.
    gate : float
        Running accuracy, in [0, 1], that ends the stage; the last stage has none.
    tokens : (int, int), optional
        Lengths of the contexts. Either these or `segments`.
    segments : (int, int), optional
        Numbers of segments of `segment_length` tokens.
    segment_length : int, optional
        Tokens per segment; needed with `segments`.
    depth : (float, float)
        Where in the context a needle may stand: 0 is its start, 1 its end.
    keys : (int, int)
        Keys (needles) per context.
    batch_size : int
        Contexts per step, for a `StepDataset` and loops of your own; other data sets take a Trainer's argument.

    Raises
    ------
    ValueError
        If a range is empty or out of bounds, or if not exactly one of `tokens` and `segments` is given.

    Examples
    --------
    >>> from gistkern.training import Stage
    >>> Stage(steps=100, gate=0.9, segments=(1, 4), segment_length=512).segments
    (1, 4)
    """

    steps: int
    gate: float = 0.0
    tokens: tuple[int, int] | None = None
    segments: tuple[int, int] | None = None
    segment_length: int | None = None
    depth: tuple[float, float] = (0.0, 1.0)
    keys: tuple[int, int] = (1, 1)
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _check(_is_int(getattr(self, name)), f"{name} must be an int >= 1, got {getattr(self, name)!r}")
        _check(0 <= self.gate <= 1, f"gate must be an accuracy in [0, 1], got {self.gate!r}")
        _check(
            (self.tokens is None) != (self.segments is None),
            "a stage needs either tokens or segments: the lengths of its contexts or their numbers of segments",
        )
        if self.segments is not None:
            _check(self.segment_length is not None, "segments needs segment_length, the tokens per segment")
        if self.segment_length is not None:
            _check(_is_int(self.segment_length), f"segment_length must be an int >= 1, got {self.segment_length!r}")
        for name in ("tokens", "segments", "keys"):
            value = getattr(self, name)
            if value is not None:
                whole = len(value) == 2 and all(_is_int(end) for end in value) and value[0] <= value[1]
                _check(whole, f"{name} must be (least, most) with 1 <= least <= most, got {value!r}")
        inside = len(self.depth) == 2 and 0 <= self.depth[0] <= self.depth[1] <= 1
        _check(inside, f"depth must be (least, most) with 0 <= least <= most <= 1, got {self.depth!r}")


class Curriculum:
    """Stages of growing difficulty: told the accuracy of every step, it says when to move to the next one.

    A stage ends once it has run its `steps` and the running accuracy (an exponential mean of what `update` gets)
    has reached its `gate`; without that after ``patience * steps``, so that a run always ends. The last stage ends
    after its steps. All state is in `state_dict`; equal accuracies give equal curricula.

    Parameters
    ----------
    stages : sequence of Stage
        At least one; the last one without a gate.
    patience : float
        At least 1.
    smoothing : float
        Weight of the past in the running accuracy, in [0, 1).
    measure : str
        Which accuracy the gates are about, for the trainer that measures it: ``"token_accuracy"`` or ``"exact"``.

    Attributes
    ----------
    index, step, stage_step : int
        Place of the stage; steps so far, and those within the stage.
    running_accuracy : float
        Within the stage; it starts at 0.
    finished : bool
        Whether the last stage is through.

    Raises
    ------
    ValueError
        For no stages, a gate on the last one (nothing would read it), an unknown measure or bad numbers.

    Examples
    --------
    >>> from gistkern.training import Curriculum, Stage
    >>> curriculum = Curriculum([Stage(steps=2, gate=0.5, tokens=(50, 60)), Stage(steps=1, tokens=(50, 3000))],
    ...                         smoothing=0.0)
    >>> [curriculum.update(accuracy) for accuracy in (1.0, 0.2, 0.6)]
    [False, False, True]
    >>> curriculum.stage.tokens, curriculum.finished
    ((50, 3000), False)
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        patience: float = 1.5,
        smoothing: float = 0.95,
        measure: str = "token_accuracy",
    ) -> None:
        _check(len(stages) > 0, "a curriculum needs at least one stage")
        for place, stage in enumerate(stages):
            _check(isinstance(stage, Stage), f"stage {place} must be a Stage, got {type(stage).__name__}")
        _check(stages[-1].gate == 0, f"the last stage has a gate of {stages[-1].gate}, which leads nowhere: set gate=0")
        _check(patience >= 1, f"patience must be at least 1, got {patience!r}")
        _check(0 <= smoothing < 1, f"smoothing must lie in [0, 1), got {smoothing!r}")
        _check(measure in MEASURES, f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        self.stages = tuple(stages)
        self.patience, self.smoothing, self.measure = patience, smoothing, measure
        self.index = self.step = self.stage_step = 0
        self.running_accuracy = 0.0
        self.finished = False

    @property
    def stage(self) -> Stage:
        """The stage that the next batch is drawn from."""
        return self.stages[self.index]

    @property
    def is_last(self) -> bool:
        """Whether `stage` is the last one."""
        return self.index == len(self.stages) - 1

    @property
    def progress(self) -> float:
        """Share of the stage's steps that are done (more than 1 while it waits for its gate)."""
        return self.stage_step / self.stage.steps

    @property
    def remaining_steps(self) -> int:
        """Steps that are left if every gate is passed in time, those that have waited for a gate not counted."""
        if self.finished:
            return 0
        later = sum(stage.steps for stage in self.stages[self.index + 1 :])
        return max(0, self.stage.steps - self.stage_step) + later

    @property
    def max_steps(self) -> int:
        """Steps of the whole curriculum if no gate is ever passed: `max_steps` for a Trainer."""
        return sum(math.ceil(self.patience * stage.steps) if stage.gate else stage.steps for stage in self.stages)

    def update(self, accuracy: float) -> bool:
        """Count one optimizer step of this `accuracy` (in [0, 1]); returns whether it ended the stage.

        Raises
        ------
        ValueError
            For an accuracy out of range (NaN too), or a curriculum that is finished.
        """
        _check(0 <= accuracy <= 1, f"accuracy must lie in [0, 1], got {accuracy!r}")
        _check(not self.finished, "the curriculum is finished: there is no stage left to count the step in")
        self.step += 1
        self.stage_step += 1
        self.running_accuracy = self.smoothing * self.running_accuracy + (1 - self.smoothing) * accuracy
        stage = self.stage
        passed = self.stage_step >= stage.steps and (self.is_last or self.running_accuracy >= stage.gate)
        if not passed and (self.is_last or self.stage_step < self.patience * stage.steps):
            return False
        if self.is_last:
            self.finished = True
        else:
            self.index, self.stage_step, self.running_accuracy = self.index + 1, 0, 0.0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that `update` changes, and the stages it belongs to, as plain JSON values."""
        return {**self._settings(), **{name: getattr(self, name) for name in _STATE}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises
        ------
        ValueError
            If the state is of other stages or settings, or is incomplete.
        """
        settings = self._settings()
        missing = [name for name in (*settings, *_STATE) if name not in state]
        _check(not missing, f"the state of the curriculum lacks {', '.join(missing)}: pass what state_dict() returned")
        for name, value in settings.items():
            _check(
                state[name] == value,
                f"the state is of another curriculum: its {name} are {state[name]}, here {value}; "
                "resume with the curriculum of the run",
            )
        for name in _STATE:
            setattr(self, name, state[name])

    def _settings(self) -> dict[str, Any]:
        stages = json.loads(json.dumps([asdict(stage) for stage in self.stages]))  # tuples become lists
        names = ("patience", "smoothing", "measure")
        return {"stages": stages, **{name: getattr(self, name) for name in names}}


_STATE = ("index", "step", "stage_step", "running_accuracy", "finished")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
