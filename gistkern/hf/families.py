"""The model families that can be patched: one row each (docs/reference/families.md says what a row needs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from gistkern.cache.rotation import check_rotation
from gistkern.cache.windows import layer_windows
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
        What the layers may look at, as the README says it: "full", or sliding windows too, where the family's attention
        modules name each layer's to transformers' attention functions (some have it in their mask alone).
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


SLIDING = "full or sliding window"  # by config.layer_types, or one window for all layers
FAMILIES = {
    row.model_type: row
    for row in (
        Family("apertus"),
        Family("arcee"),
        Family("bitnet"),
        Family("cohere", pairs="neighbors"),
        Family("cohere2", attention=SLIDING, pairs="neighbors", rotated=_slides),
        Family("dots1", attention=SLIDING),
        Family("ernie4_5", pairs="neighbors"),
        Family("ernie4_5_moe", pairs="neighbors"),
        Family("exaone", since="5.24"),
        Family(
            "exaone4",
            attention=SLIDING,
            rotated=lambda config, layer: not config.sliding_window or _slides(config, layer),
        ),
        Family("flex_olmo"),
        Family("gemma"),
        Family("gemma3_text", attention=SLIDING),
        Family("glm", pairs="neighbors"),
        Family("glm4", pairs="neighbors"),
        Family("glm4_moe"),
        Family("gpt_neox", decoder="gpt_neox"),
        Family("gpt_oss", attention=SLIDING + ", learned sinks"),
        Family("granite"),
        Family("granitemoe"),
        # Granite 4 without Mamba layers; some releases rotate nothing
        Family("granitemoehybrid", since="5.24", rotated=lambda config, _: config.position_embedding_type == "rope"),
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
        Family("ministral", attention=SLIDING),
        Family("ministral3", attention=SLIDING, positions_in_scores="llama_4_scaling_beta"),
        Family("mistral", attention=SLIDING),
        Family("mixtral", attention=SLIDING),
        Family("nanochat", backwards=True),
        Family("olmo"),
        Family("olmo2"),
        Family("olmo3", attention=SLIDING),
        Family("olmoe"),
        Family("persimmon"),
        Family("phi"),
        Family("phi3", attention=SLIDING),
        Family("phimoe"),
        Family("qwen2", attention=SLIDING),
        Family("qwen2_moe"),
        Family("qwen3", attention=SLIDING),
        Family("qwen3_moe", attention=SLIDING),
        Family("sarvam_moe", since="5.24"),
        Family("seed_oss"),
        Family("smollm3", attention=SLIDING, rotated=lambda config, layer: bool(config.no_rope_layers[layer])),
        Family("solar_open"),
        Family("starcoder2", attention=SLIDING),
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
            "(docs/reference/families.md)"
        )
    family = FAMILIES[model.config.model_type]
    inner = getattr(model, family.decoder, model)
    if not hasattr(inner, "layers") or (inner is not model and not model.can_generate()):
        raise TypeError(
            f"{type(model).__name__} cannot be patched: its head reads other columns and labels than a language "
            "model's. Expected a causal model (...ForCausalLM), or the inner model of one"
            + (f": patch_llama(model.{family.decoder}) compresses for this one" if hasattr(inner, "layers") else "")
        )
    _check_windows(inner.config, family)
    check_rotation(model.config, inner)
    return family


def inner_model(model: PreTrainedModel) -> Any:
    """The module that embeds tokens and runs the decoder layers."""
    return getattr(model, FAMILIES[model.config.model_type].decoder, model)


def _check_windows(config: Any, family: Family) -> None:
    """Raise ValueError for layers that the gist mask would not mask as the model does."""
    windows = layer_windows(config)
    if any(windows) and family.attention == "full":
        raise ValueError(
            f"this {family.model_type} model has layers with a sliding window, which the family's attention does not "
            "name to gistkern, so the gist mask would ignore it. If full attention inside a segment is what you want, "
            "load the model so: config = AutoConfig.from_pretrained(path); config.sliding_window = None; "
            'config.layer_types = ["full_attention"] * config.num_hidden_layers; '
            "model = AutoModelForCausalLM.from_pretrained(path, config=config)"
        )
    both = getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True)
    if both:
        raise ValueError("this model's tokens see those after them (bidirectional attention), gist tokens need causal")
