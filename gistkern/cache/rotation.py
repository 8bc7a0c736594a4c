"""Which rotary position embeddings gist rows can live with: those whose frequencies never change."""

from __future__ import annotations

from typing import Any

__all__ = ["FIXED", "check_rotation"]

_ALPHA = "ntk_alpha"  # HunYuan's, called dynamic in its configs: fixed frequencies, from transformers 5.24 on

# rotations by fixed frequencies; others (dynamic, longrope) change them with the length of the text
FIXED = ("default", "linear", "llama3", "yarn")


def check_rotation(config: Any, inner: Any = None) -> None:
    """Raise ValueError unless keys are turned by their position alone.

    A rotation that depends on the length of the text turns the gist rows otherwise in training, where the whole stream
    is one call, than in a compression, which reads the context without the question: the two would disagree.

    Parameters
    ----------
    config : PreTrainedConfig
        With ``rope_parameters`` (or ``rope_scaling``), of one rotation or of one per layer type.
    inner : PreTrainedModel, optional
        The model, whose rotation counts where its config was changed afterwards.
    """
    kinds = _kinds(getattr(config, "rope_parameters", None)) + _kinds(getattr(config, "rope_scaling", None))
    running = getattr(getattr(inner, "rotary_emb", None), "rope_type", None)
    kinds += list(running.values()) if isinstance(running, dict) else [running or "default"]
    for kind in kinds:
        if kind not in (*FIXED, _ALPHA):
            raise ValueError(
                f"rope_type {kind!r} turns keys by the length of the text, so what is compressed would differ from "
                f"what was trained: load the model with rope_parameters of one of {', '.join(FIXED)}"
            )


def _kinds(parameters: Any) -> list[Any]:
    """The rope types that a config names, under the new and the old key."""
    if not isinstance(parameters, dict):
        return []
    nested = [kind for value in parameters.values() for kind in _kinds(value)]
    own = parameters.get("rope_type", parameters.get("type"))
    if own == "dynamic" and parameters.get("alpha"):
        own = _ALPHA  # another model, or an older transformers, says otherwise when its own embedding is looked at
    return nested if own is None else [own, *nested]
