"""Training presets: everything that a run depends on, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["PRESETS", "Preset", "Stage", "preset"]


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: contexts of `segments` (least, most) segments of `segment_length` tokens.

    A gated stage ends when it has run `steps` steps and the running digit accuracy has reached `gate`, or
    after half as many steps again. The last stage has no gate; its learning rate falls to zero.
    """

    segments: tuple[int, int]
    segment_length: int
    batch_size: int
    steps: int
    gate: float = 0.0


@dataclass(frozen=True)
class Preset:
    """A model, its gist scheme, a curriculum and an evaluation.

    Each batch is in one of the `languages`. `evaluate` lists (language, tokens, samples).
    `learning_rate` is for a batch of 32 and scales with the square root of the batch; Muon and AdamW take
    multiples of it. `leak` trains with the mask off: the failure that gistkern exists to prevent.
    """

    name: str
    stages: tuple[Stage, ...]
    evaluate: tuple[tuple[str, int, int], ...]
    languages: tuple[str, ...] = ("en", "ko")
    vocab_size: int = 1024
    gist_tokens: int = 10
    segment_gist_tokens: int = 8
    positions: str = "gist_first"
    sink_tokens: int = 0
    segment_overlap: int = 24  # longer than one statement of a key, which a boundary then cannot cut in both segments
    learning_rate: float = 4e-3
    muon_factor: float = 4.0
    adamw_factor: float = 2.0
    warmup_steps: int = 50
    checkpoint_every: int = 100
    leak: bool = False

    @property
    def segments(self) -> dict[str, int]:
        """How contexts are cut when compressing: `gistkern.compress` takes these arguments."""
        return {"segment_length": self.stages[-1].segment_length, "segment_overlap": self.segment_overlap}


_TINY = Preset(
    name="tiny",
    # short segments first: the copying circuit forms four times sooner at 56 tokens than at 96
    stages=(
        Stage((1, 1), 56, batch_size=32, steps=250, gate=0.85),
        Stage((1, 1), 96, batch_size=32, steps=250, gate=0.93),
        Stage((2, 8), 96, batch_size=8, steps=250, gate=0.93),
        Stage((2, 48), 96, batch_size=4, steps=560),
    ),
    evaluate=(
        ("en", 500, 50),
        ("ko", 500, 50),
        ("en", 2990, 200),
        ("ko", 2990, 50),
        ("en", 6096, 50),
        ("ko", 6096, 200),
    ),
)

# minutes become seconds: for the tests and for a first look; it does not learn to retrieve
_SMOKE = replace(
    _TINY,
    name="smoke",
    stages=(Stage((1, 1), 56, 2, 4), Stage((1, 2), 56, 2, 4)),
    evaluate=(("en", 120, 4), ("ko", 120, 4)),
    warmup_steps=2,
    checkpoint_every=2,
)

PRESETS = {one.name: one for one in (_TINY, _SMOKE)}


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
    first = found.stages[0]
    return replace(
        found,
        name=f"{name}-leak",
        stages=(replace(first, steps=2 * first.steps),),
        evaluate=tuple((language, first.segment_length - 2, 50) for language in found.languages),
        positions="absolute",
        segment_overlap=0,
        leak=True,
    )
