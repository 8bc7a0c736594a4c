"""The model families that can be patched: one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from gistkern.cache.rotation import check_rotation

__all__ = ["FAMILIES", "Family", "family_of", "inner_model"]


@dataclass(frozen=True)
class Family:
    """How to find the parts of a model family.

    `decoder` names the attribute of the causal model that holds the inner model (embeddings and layers).
    """

    model_type: str
    decoder: str = "model"


FAMILIES = {row.model_type: row for row in (Family("llama"), Family("mistral"), Family("qwen2"), Family("qwen3"))}


def family_of(model: PreTrainedModel) -> Family:
    """The model's row.

    Raises
    ------
    TypeError
        If the object is no supported transformers model; names what is.
    ValueError
        If the model uses a feature that the gist mask does not cover.
    """
    supported = ", ".join(FAMILIES)
    if not isinstance(model, PreTrainedModel):
        wrapped = any(hasattr(model, name) for name in ("module", "_orig_mod"))
        raise TypeError(
            f"expected a transformers model of type {supported}, got {type(model).__name__}"
            + (": patch the model itself, then wrap it (DDP, FSDP, torch.compile)" if wrapped else "")
        )
    if model.config.model_type not in FAMILIES:
        raise TypeError(f"models of type {model.config.model_type!r} are not supported: expected one of {supported}")
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
        slides = getattr(config, "sliding_window", None) is not None
    if slides or other:
        raise ValueError(
            "the model's own sliding window would be ignored by the gist mask. If full attention inside a segment is "
            f"what you want, load the model so: config = AutoConfig.from_pretrained(path); {change}; "
            "model = AutoModelForCausalLM.from_pretrained(path, config=config)"
        )
