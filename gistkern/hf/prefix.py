"""Gist rows as an ordinary prefix, for models and engines that know nothing of gist tokens."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.cache_utils import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gistkern.cache.cache import GistCache
from gistkern.cache.rotation import check_rotation
from gistkern.cache.windows import layer_windows
from gistkern.hf.families import FAMILIES, Family
from gistkern.hf.refusals import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["plain_prefix", "refuse_windows"]


def plain_prefix(cache: GistCache, config: PreTrainedConfig) -> DynamicCache:
    """The rows of a compressed context as the cache of a model that was never patched.

    Rotary position embeddings (Su et al. 2021, "RoFormer") make scores depend on differences of positions only. So the
    keys are turned back by as much as the tail's first position exceeds the number of rows: what follows then begins
    right behind the rows, as behind any prefix of so many tokens, whatever the position scheme, sinks and summaries.
    Each family turns them its own way (docs/reference/families.md): part of a head, halves or neighbors, some layers
    not at all.

    Parameters
    ----------
    cache : GistCache
        Of `gistkern.compress`, a file or a store, without a tail.
    config : PreTrainedConfig
        Of the model that wrote it (its rotary embedding).

    Returns
    -------
    DynamicCache
        Keys and values ``[B, Hkv, G, D]``, copies. Samples that own fewer than G rows have theirs in the last columns:
        hide the columns before by an attention mask, from which `generate` counts positions too.

    Raises
    ------
    ValueError
        If the cache is empty or has a tail, the rotation depends on the length of the text, a score on more than the
        difference of two positions, or layers have a sliding window, which the rows would leave as the text goes on.
    TypeError
        For the config of a model that cannot be patched.

    Notes
    -----
    The frequencies are those of the config, in fp32. ``model.to(torch.bfloat16)`` rounds a model's own, and with them
    all that it compresses; ``from_pretrained(..., dtype=torch.bfloat16)`` does not.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> cache = gistkern.compress(model, tokenizer("The bell is with Mira.", return_tensors="pt"))
    >>> prefix = gistkern.plain_prefix(cache, model.config)
    >>> handle.unpatch()  # what follows needs a plain model only
    >>> question = tokenizer(" Who has it?", return_tensors="pt").input_ids
    >>> placeholders = torch.zeros(1, prefix.get_seq_length(), dtype=torch.long)  # counted, never read
    >>> ids = torch.cat([placeholders, question], 1)
    >>> out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=prefix, max_new_tokens=4)
    """
    state = cache.without_tail("make the prefix before asking, from a clone")
    family = _family(config)
    refuse_windows(config)
    back = (state.gist_rows - state.tail_position).double() * (-1 if family.backwards else 1)
    rotary = _rotary(config)
    prefix = DynamicCache()
    for index in range(len(cache.layers)):
        keys, values = cache.compact(index)
        if family.rotated(config, index):
            frequencies = _frequencies(rotary, config, index).to(back.device).double()
            keys = _turn(keys, back[:, None] * frequencies, family.pairs)
        else:
            keys = keys.clone()
        prefix.update(keys, values.clone(), index)
    return prefix


def refuse_windows(config: PreTrainedConfig) -> None:
    """Raise ValueError if a layer has a sliding window."""
    if any(layer_windows(config)):
        raise ValueError(
            f"layers of this model have a sliding window ({config.sliding_window} rows), which gist rows would leave "
            "as the text goes on: an unpatched model cannot read them as a prefix. Ask with the patched model"
        )


def _family(config: PreTrainedConfig) -> Family:
    """The row of a config; an error if it has none, or its scores change when all positions move alike."""
    refuse(config)
    if config.model_type not in FAMILIES:
        raise TypeError(f"models of type {config.model_type!r} cannot be patched: how they turn keys is not known")
    family, parameters = FAMILIES[config.model_type], getattr(config, "rope_parameters", None) or {}
    if family.positions_in_scores is not None and parameters.get(family.positions_in_scores):
        raise ValueError(
            f"scores of a {config.model_type} model depend on positions themselves ({family.positions_in_scores} in "
            "config.rope_parameters), so the rows of a context mean something else at other positions: ask with "
            "the patched model"
        )
    return family


def _rotary(config: PreTrainedConfig) -> torch.nn.Module:
    """The family's own rotary embedding, which knows how much of a head it turns."""
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
    name = model.__name__.removesuffix("ForCausalLM") + "RotaryEmbedding"
    rotary = getattr(sys.modules[model.__module__], name)(config)
    check_rotation(config, SimpleNamespace(rotary_emb=rotary))
    return rotary


def _frequencies(rotary: torch.nn.Module, config: PreTrainedConfig, layer: int) -> torch.Tensor:
    """``[R / 2]`` of a layer: some families have others for each type of layer."""
    kinds = getattr(config, "layer_types", None)
    own = getattr(rotary, f"{kinds[layer]}_inv_freq", None) if kinds else None
    return rotary.inv_freq if own is None else own  # type: ignore[return-value]


def _turn(keys: torch.Tensor, angles: torch.Tensor, pairs: str) -> torch.Tensor:
    """Keys ``[B, Hkv, G, D]`` with their first R elements turned by angles ``[B, R / 2]``, in fp64."""
    width = 2 * angles.shape[-1]
    turned, rest = keys.double().split([width, keys.shape[-1] - width], -1)
    # [B, Hkv, G, R / 2] each
    first, second = turned.unflatten(-1, (2, -1) if pairs == "halves" else (-1, 2)).unbind(
        -2 if pairs == "halves" else -1
    )
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    both = first * cosine - second * sine, second * cosine + first * sine
    turned = torch.stack(both, -2 if pairs == "halves" else -1).flatten(-2)
    return torch.cat([turned, rest], -1).to(keys.dtype)
