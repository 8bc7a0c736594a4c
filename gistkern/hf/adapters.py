"""The model families that can be patched: one row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

__all__ = ["ADAPTERS", "Adapter", "adapter_for", "inner_model"]


@dataclass(frozen=True)
class Adapter:
    """How to find the parts of a model family.

    `decoder` names the attribute of the causal model that holds the inner model (embeddings and layers).
    """

    model_type: str
    decoder: str = "model"


ADAPTERS = {row.model_type: row for row in (Adapter("llama"), Adapter("mistral"), Adapter("qwen2"), Adapter("qwen3"))}


def adapter_for(model: PreTrainedModel) -> Adapter:
    """The model's row.

    Raises
    ------
    TypeError
        If the object is no supported transformers model; names what is.
    ValueError
        If the model uses a feature that the gist mask does not cover.
    """
    supported = ", ".join(ADAPTERS)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model of type {supported}, got {type(model).__name__}")
    if model.config.model_type not in ADAPTERS:
        raise TypeError(f"models of type {model.config.model_type!r} are not supported: expected one of {supported}")
    layer_types = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if getattr(model.config, "sliding_window", None) or layer_types != {"full_attention"}:
        raise ValueError(
            "the model's own sliding window would be ignored by the gist mask: load it with "
            "config.sliding_window=None if full attention inside a segment is what you want"
        )
    return ADAPTERS[model.config.model_type]


def inner_model(model: PreTrainedModel) -> Any:
    """The module that embeds tokens and runs the decoder layers."""
    return getattr(model, adapter_for(model).decoder, model)
