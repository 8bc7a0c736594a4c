"""The model families that can be patched: one row each (docs/families.md says what a row needs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from gistkern.cache.rotation import check_rotation
from gistkern.hf.refusals import refuse

__all__ = ["FAMILIES", "Family", "family_of", "inner_model"]


def _every_layer(config: Any, layer: int) -> bool:
    return True


def _slides(config: Any, layer: int) -> bool:
    return config.layer_types[layer] == "sliding_attention"


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its parts, and how its keys are turned by their positions.

    Attributes
    ----------
    model_type : str
        As in its config.json.
    decoder : str
        Attribute of the causal model that holds the inner model (embeddings and layers).
    attention : str
        What the layers may look at, as the README says it.
    since : str
        Oldest transformers that was seen to have the family; "" if the oldest that gistkern takes (5.6) has it.
    pairs : str
        Which elements of a head one frequency turns: ``"halves"`` (d and d + D / 2) or ``"neighbors"`` (2 d, 2 d + 1).
    backwards : bool
        Whether keys are turned the other way round as their position grows.
    rotated : callable
        Whether a layer (of a config, by its number) turns its keys; where none turns, positions play no role.
    positions_in_scores : str or None
        Key of ``config.rope_parameters`` under which scores depend on a position itself, and not on differences only.
    """

    model_type: str
    decoder: str = "model"
    attention: str = "full"
    since: str = ""
    pairs: str = "halves"
    backwards: bool = False
    rotated: Callable[[Any, int], bool] = _every_layer
    positions_in_scores: str | None = None


FAMILIES = {
    row.model_type: row
    for row in (
        Family("apertus"),
        Family("arcee"),
        Family("bitnet"),
        Family("cohere", pairs="neighbors"),
        Family("dots1"),
        Family("ernie4_5", pairs="neighbors"),
        Family("ernie4_5_moe", pairs="neighbors"),
        Family("exaone", since="5.24"),
        Family("exaone4", rotated=lambda config, layer: not config.sliding_window or _slides(config, layer)),
        Family("flex_olmo"),
        Family("gemma"),
        Family("glm", pairs="neighbors"),
        Family("glm4", pairs="neighbors"),
        Family("glm4_moe"),
        Family("gpt_neox", decoder="gpt_neox"),
        Family("granite"),
        Family("granitemoe"),
        Family("granitemoeshared"),
        Family("helium", pairs="neighbors"),
        Family("hunyuan_v1_dense"),
        Family("hunyuan_v1_moe"),
        Family("hy_v3"),
        Family("hyperclovax", since="5.24"),
        Family("internlm3", since="5.24"),
        Family("iquestcoder", since="5.24"),
        Family("jais2"),
        Family("llama"),
        Family("minimax_m2"),
        Family("ministral3", positions_in_scores="llama_4_scaling_beta"),
        Family("mistral"),
        Family("mixtral"),
        Family("nanochat", backwards=True),
        Family("olmo"),
        Family("olmo2"),
        Family("olmoe"),
        Family("persimmon"),
        Family("phi"),
        Family("phi3"),
        Family("phimoe"),
        Family("qwen2"),
        Family("qwen2_moe"),
        Family("qwen3"),
        Family("qwen3_moe"),
        Family("sarvam_moe", since="5.24"),
        Family("seed_oss"),
        Family("smollm3", rotated=lambda config, layer: bool(config.no_rope_layers[layer])),
        Family("solar_open"),
        Family("starcoder2"),
    )
}


def family_of(model: PreTrainedModel) -> Family:
    """The model's row.

    Raises
    ------
    TypeError
        If the object is no supported transformers model; names what is, or which feature stands in the way.
    ValueError
        If the model uses a feature that the gist mask does not cover.
    """
    if not isinstance(model, PreTrainedModel):
        wrapped = any(hasattr(model, name) for name in ("module", "_orig_mod"))
        raise TypeError(
            f"expected a transformers model, got {type(model).__name__}"
            + (": patch the model itself, then wrap it (DDP, FSDP, torch.compile)" if wrapped else "")
        )
    refuse(model.config)
    if model.config.model_type not in FAMILIES:
        raise TypeError(
            f"models of type {model.config.model_type!r} are not supported: expected one of {', '.join(FAMILIES)}. "
            "If its attention is rotary full attention, one row in gistkern/hf/families.py may be all it needs "
            "(docs/families.md)"
        )
    family = FAMILIES[model.config.model_type]
    inner = getattr(model, family.decoder, model)
    if not hasattr(inner, "layers") or (inner is not model and not model.can_generate()):
        raise TypeError(
            f"{type(model).__name__} cannot be patched: its head reads other columns and labels than a language "
            "model's. Expected a causal model (...ForCausalLM), or the inner model of one"
            + (f": patch_llama(model.{family.decoder}) compresses for this one" if hasattr(inner, "layers") else "")
        )
    _check_windows(model.config, inner)
    check_rotation(model.config, inner)
    return family


def inner_model(model: PreTrainedModel) -> Any:
    """The module that embeds tokens and runs the decoder layers."""
    return getattr(model, FAMILIES[model.config.model_type].decoder, model)


def _check_windows(config: Any, inner: Any) -> None:
    """Raise ValueError if a layer has a sliding window, which the gist mask would not keep."""
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    change = "config.sliding_window = None"
    if hasattr(inner, "has_sliding_layers"):  # Qwen's: which layers slide is settled by layer_types, when it is made
        slides = inner.has_sliding_layers
        change += '; config.layer_types = ["full_attention"] * config.num_hidden_layers'
    else:
        slides = bool(getattr(config, "sliding_window", None))  # Qwen2-MoE's is 0 where there is none
    if slides or other:
        raise ValueError(
            "the model's own sliding window would be ignored by the gist mask. If full attention inside a segment is "
            f"what you want, load the model so: config = AutoConfig.from_pretrained(path); {change}; "
            "model = AutoModelForCausalLM.from_pretrained(path, config=config)"
        )
