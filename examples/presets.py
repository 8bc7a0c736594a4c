"""Training presets: everything that a run depends on, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gistkern.training import Stage

__all__ = ["PRESETS", "RECIPES", "Preset", "preset"]

# what llama3.py trains with transformers' Trainer
RECIPES = {path.stem: path for path in (Path(__file__).parent / "configs").glob("*.yaml")}

# (language, tokens, samples) and, where they are not ("templates", "training"): filler, wordings
Row = tuple[str, int, int] | tuple[str, int, int, str, str]


@dataclass(frozen=True)
class Preset:
    """A model, its gist scheme, a curriculum and an evaluation.

    Each batch is in one of the `languages`, on a haystack of one of the `fillers` (one listed twice is drawn twice as
    often). A stage's batch holds `batch_size` contexts, but no more than `batch_tokens` tokens. `gate_on` is the
    accuracy that the stages' gates are about, ``"digit"`` or ``"exact"``. `learning_rate` is for a batch of
    `rate_batch` contexts and scales with the square root of the batch; Muon (where its factor is not 0) and AdamW
    take multiples of it. `gist_template` is a text whose tokens the gist rows start as; without it they start around
    the mean of the vocabulary. `leak` trains with the mask off: the failure that gistkern exists to prevent.
    """

    name: str
    model: str
    stages: tuple[Stage, ...]
    evaluate: tuple[Row, ...]
    languages: tuple[str, ...] = ("en", "ko")
    fillers: tuple[str, ...] = ("templates",)
    asked_by: str = "question"
    gist_tokens: int = 10
    segment_gist_tokens: int = 8
    positions: str = "gist_first"
    sink_tokens: int = 0
    segment_overlap: int = 36  # about the longest needle, which a boundary then leaves whole in one of two segments
    gist_template: str = ""
    learning_rate: float = 4e-3
    rate_batch: int = 32
    muon_factor: float = 3.0
    adamw_factor: float = 2.0
    adamw_betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 50
    batch_tokens: int = 1 << 20
    gate_on: str = "digit"
    smoothing: float = 0.95
    checkpoint_every: int = 100
    leak: bool = False

    @property
    def segments(self) -> dict[str, int]:
        """How contexts are cut when compressing: `gistkern.compress` takes these arguments."""
        length = self.stages[-1].segment_length
        return {} if length is None else {"segment_length": length, "segment_overlap": self.segment_overlap}


def _segments(least: int, most: int, length: int, batch_size: int, steps: int, gate: float = 0.0) -> Stage:
    return Stage(segments=(least, most), segment_length=length, batch_size=batch_size, steps=steps, gate=gate)


_TINY = Preset(
    name="tiny",
    model="tiny",
    # short segments first: the copying circuit forms four times sooner at 56 tokens than at 96
    stages=(
        _segments(1, 1, 56, batch_size=32, steps=250, gate=0.85),
        _segments(1, 1, 96, batch_size=32, steps=200, gate=0.93),
        _segments(2, 16, 96, batch_size=32, steps=100, gate=0.93),
        # 168 segments hold 12,100 tokens
        _segments(2, 170, 96, batch_size=32, steps=350),
    ),
    evaluate=(
        ("en", 500, 50),
        ("ko", 500, 50),
        ("en", 2990, 200),
        ("ko", 2990, 50),
        ("en", 6096, 50),
        ("ko", 6096, 200),
        ("en", 12100, 200),
        ("ko", 12100, 200),
        ("en", 2990, 50, "templates", "held_out"),
        ("ko", 2990, 50, "templates", "held_out"),
        ("en", 2990, 50, "prose", "training"),
        ("ko", 2990, 50, "prose", "training"),
    ),
)


def _tokens(least: int, most: int, batch_size: int, steps: int, gate: float = 0.0) -> Stage:
    return Stage(tokens=(least, most), batch_size=batch_size, steps=steps, gate=gate)


_SMOLLM2 = Preset(
    name="smollm2",
    model="smollm2",
    # bare statements first, and in English first: from contexts of 64 tokens on nothing was learned within 50 steps
    stages=(
        _tokens(16, 16, batch_size=16, steps=25, gate=0.85),
        _tokens(28, 28, batch_size=16, steps=25, gate=0.85),
        _tokens(30, 60, batch_size=10, steps=12, gate=0.9),
        _tokens(64, 160, batch_size=8, steps=20, gate=0.9),
        _tokens(128, 320, batch_size=5, steps=20, gate=0.9),
        _tokens(256, 640, batch_size=3, steps=25, gate=0.9),
        _tokens(512, 1400, batch_size=2, steps=25, gate=0.9),
        _tokens(1000, 3000, batch_size=2, steps=40),
    ),
    batch_tokens=3100,
    evaluate=(
        ("en", 500, 40, "prose", "training"),
        ("en", 1000, 40, "prose", "training"),
        ("en", 2000, 40, "prose", "training"),
        ("en", 2990, 100, "prose", "training"),
        ("en", 2990, 40, "prose", "held_out"),
        ("ko", 500, 40, "prose", "training"),
        ("ko", 1000, 40, "prose", "training"),
        ("ko", 2990, 40, "prose", "training"),
    ),
    languages=("en", "en", "ko"),
    fillers=("prose", "prose", "prose", "templates"),
    asked_by="cue",
    segment_gist_tokens=0,
    positions="absolute",
    segment_overlap=0,
    gist_template="\nThe pass key is 12345",
    learning_rate=1.5e-3,
    rate_batch=16,
    muon_factor=0.0,
    adamw_factor=1.0,
    adamw_betas=(0.9, 0.95),  # with 0.98 the loss went up by 9 when the digits were first read
    warmup_steps=10,
    gate_on="exact",
    smoothing=0.8,
    checkpoint_every=10,
)

# the same gists, not told the answer's form: how many steps does the first stage take then?
_SMOLLM2_MEAN = replace(
    _SMOLLM2,
    name="smollm2-mean",
    gist_template="",
    stages=(replace(_SMOLLM2.stages[0], steps=80), _SMOLLM2.stages[1], replace(_SMOLLM2.stages[2], gate=0.0)),
    evaluate=(("en", 60, 100, "prose", "training"),),
)

# minutes become seconds: for the tests and for a first look; it does not learn to retrieve
_SMOKE = replace(
    _TINY,
    name="smoke",
    stages=(_segments(1, 1, 56, 2, 4), _segments(1, 2, 56, 2, 4)),
    evaluate=(("en", 120, 4), ("ko", 120, 4)),
    warmup_steps=2,
    checkpoint_every=2,
)

PRESETS = {one.name: one for one in (_TINY, _SMOKE, _SMOLLM2, _SMOLLM2_MEAN)}


def preset(name: str, leak: bool = False) -> Preset:
    """The preset called `name`; ValueError names the known ones.

    With `leak` the curriculum ends with single short contexts, which an unmasked model of this size learns to
    read as well, and tokens keep their places in the stream: `gist_first` means nothing where all is seen.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    found = PRESETS[name]
    if not leak:
        return found
    if found.model != "tiny":
        raise ValueError(f"leak is the tiny model's experiment, {name!r} trains {found.model}: pass --preset tiny")
    first = found.stages[0]
    return replace(
        found,
        name=f"{name}-leak",
        stages=(replace(first, steps=2 * first.steps, gate=0.0),),
        evaluate=tuple((language, first.segment_length - 2, 50) for language in found.languages),
        positions="absolute",
        segment_overlap=0,
        leak=True,
    )
