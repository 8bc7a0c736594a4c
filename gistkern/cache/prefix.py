"""Gist rows as an ordinary prefix, for models and engines that know nothing of gist tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gistkern.cache.cache import GistCache
from gistkern.cache.rotation import check_rotation

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["plain_prefix"]


def plain_prefix(cache: GistCache, config: PreTrainedConfig) -> DynamicCache:
    """The rows of a compressed context as the cache of a model that was never patched.

    Rotary position embeddings (Su et al. 2021, "RoFormer") make scores depend on differences of positions only. So the
    keys are turned back by as much as the tail's first position exceeds the number of rows: what follows then begins
    right behind the rows, as behind any prefix of so many tokens, whatever the position scheme, sinks and summaries.

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
        If the cache is empty or has a tail, or the rotation depends on the length of the text.

    Notes
    -----
    The frequencies are those of the config, in fp32. ``model.to(torch.bfloat16)`` rounds a model's own, and with them
    all that it compresses; ``from_pretrained(..., dtype=torch.bfloat16)`` does not.

    Examples
    --------
    ::

        prefix = gistkern.plain_prefix(store["a"], plain.config)
        placeholders = torch.zeros(1, prefix.get_seq_length(), dtype=torch.long)    # counted, never read
        ids = torch.cat([placeholders, question], 1)
        plain.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=prefix)
    """
    state = cache.without_tail("make the prefix before asking, from a clone")
    check_rotation(config)
    back = (state.gist_rows - state.tail_position).double()
    frequencies = LlamaRotaryEmbedding(config).inv_freq.to(back.device).double()  # type: ignore[arg-type]
    angles = (back[:, None] * frequencies)[:, None, None]  # [B, 1, 1, D / 2]
    cosine, sine = angles.cos(), angles.sin()
    prefix = DynamicCache()
    for index in range(len(cache.layers)):
        keys, values = cache.compact(index)
        prefix.update(_turn(keys, cosine, sine), values.clone(), index)
    return prefix


def _turn(keys: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (d, d + D / 2), in fp64: once per document."""
    first, second = keys.double().chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(keys.dtype)
