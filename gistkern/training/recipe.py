"""A training run as a YAML file: read strictly, turned into the settings of transformers, peft and bitsandbytes.

Keys are named like the arguments that they become. An unknown or missing key, a key given twice and a value of the
wrong type are errors, so that no setting is lost to a typing mistake.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import yaml

from gistkern.training.curriculum import Curriculum, Stage
from gistkern.training.objectives import Objectives

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

__all__ = [
    "CurriculumSection",
    "DataSection",
    "EvaluationRow",
    "EvaluationSection",
    "GistSection",
    "LoraSection",
    "ModelSection",
    "QuantizationSection",
    "Recipe",
    "TrainingSection",
    "read_recipe",
]

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSection:
    """`name` is a folder or a name on the hub.

    `architecture` repeats the arguments of its `LlamaConfig`, so that memory can be calculated and parameters can be
    counted without the weights. `resize_vocabulary` appends a row per gist token to the two vocabulary matrices.
    """

    name: str
    dtype: Literal["bfloat16", "float32"]
    architecture: dict[str, Any]
    resize_vocabulary: bool = False

    def __post_init__(self) -> None:
        from transformers import LlamaConfig

        _check_known(self.architecture, LlamaConfig().to_dict(), "architecture.")  # which itself takes anything


@dataclass(frozen=True)
class QuantizationSection:
    """Arguments of `transformers.BitsAndBytesConfig`."""

    load_in_4bit: Literal[True]
    bnb_4bit_quant_type: Literal["nf4"]
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: Literal["bfloat16", "float32"]

    def config(self) -> BitsAndBytesConfig:
        """For `from_pretrained`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**asdict(self))


@dataclass(frozen=True)
class GistSection:
    """Arguments of `gistkern.patch_llama`."""

    num_gist_tokens: int
    sink_tokens: int
    positions: Literal["absolute", "gist_first"]


@dataclass(frozen=True)
class LoraSection:
    """Arguments of `peft.LoraConfig`."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]

    def config(self) -> LoraConfig:
        """For `peft.get_peft_model`."""
        from peft import LoraConfig

        lists = {name: list(getattr(self, name)) for name in ("target_modules", "modules_to_save")}
        return LoraConfig(**{**asdict(self), **lists}, task_type="CAUSAL_LM")


@dataclass(frozen=True)
class DataSection:
    """Which passkey contexts are drawn, beside the lengths, depths and keys of the curriculum."""

    languages: tuple[Literal["en", "ko"], ...]
    filler: Literal["templates", "prose"]


@dataclass(frozen=True)
class EvaluationRow:
    """So many held-out questions about contexts of so many tokens."""

    language: Literal["en", "ko"]
    tokens: int
    samples: int
    filler: Literal["templates", "prose"]
    wordings: Literal["training", "held_out"]


@dataclass(frozen=True)
class EvaluationSection:
    """What the trained model is asked."""

    rows: tuple[EvaluationRow, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("no rows: give at least one")


@dataclass(frozen=True)
class CurriculumSection:
    """Arguments of `gistkern.training.Curriculum`; they also say how many steps a run has."""

    stages: tuple[Stage, ...]
    patience: float = 1.5

    def __post_init__(self) -> None:
        for place, stage in enumerate(self.stages):
            if stage.tokens is None:
                raise ValueError(f"stage {place} counts segments, but contexts are one segment here: give tokens")
            if stage.batch_size != 1:
                raise ValueError(f"stage {place} has a batch_size: set training.per_device_train_batch_size instead")
        self.curriculum()

    def curriculum(self) -> Curriculum:
        """A fresh one."""
        return Curriculum(self.stages, self.patience)


@dataclass(frozen=True)
class TrainingSection:
    """Arguments of `transformers.TrainingArguments`."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    optim: str
    bf16: bool
    gradient_checkpointing: bool
    save_steps: int
    logging_steps: int = 1
    save_total_limit: int | None = None
    seed: int = 0
    report_to: tuple[str, ...] = ()

    def arguments(self, output_dir: Path, max_steps: int, use_cpu: bool = False) -> TrainingArguments:
        """For `transformers.Trainer`."""
        from transformers import TrainingArguments

        given = {**asdict(self), "report_to": list(self.report_to) or "none"}
        if self.gradient_checkpointing:
            given["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        return TrainingArguments(output_dir=str(output_dir), max_steps=max_steps, use_cpu=use_cpu, **given)


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on."""

    model: ModelSection
    gists: GistSection
    lora: LoraSection
    data: DataSection
    curriculum: CurriculumSection
    training: TrainingSection
    evaluation: EvaluationSection
    quantization: QuantizationSection | None = None
    objectives: Objectives = field(default_factory=Objectives)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file, or in the JSON that a run keeps of it.

    Raises
    ------
    ValueError
        If a key is unknown (the closest known one is named), missing or given twice, or a value has the wrong type.
    """
    try:
        text = Path(path).read_text("utf-8")
        # JSON's 1e-05 is a text to YAML
        found = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, Loader=_Loader)  # a SafeLoader
        return _section(Recipe, found, "")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


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


def _section(kind: type[T], value: Any, where: str) -> T:
    """A dataclass from a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where or 'the file'} must be a mapping of keys to values, got {value!r}")
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    _check_known(value, known, prefix)
    required = [name for name, one in known.items() if one.default is MISSING and one.default_factory is MISSING]
    missing = [prefix + name for name in required if name not in value]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    hints = typing.get_type_hints(kind)
    given = {name: _value(hints[name], one, prefix + name) for name, one in value.items()}
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_known(given: Iterable[str], known: Mapping[str, Any], prefix: str) -> None:
    for name in given:
        if name not in known:
            closest = get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown key {prefix}{name}: did you mean {prefix}{closest}? Known here are {', '.join(known)}"
            )


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):  # only X | None is used
        return None if value is None else _value(next(one for one in arguments if one is not type(None)), value, where)
    if is_dataclass(hint):
        return _section(typing.cast(type, hint), value, where)
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
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping of keys to values, got {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        note = " (YAML reads 1e-4 as a text: write 1.0e-4)" if hint is float and isinstance(value, str) else ""
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}{note}")
    return value
