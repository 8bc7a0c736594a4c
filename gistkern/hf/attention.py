"""The two functions registered with transformers under the name "gistkern"."""

from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

__all__ = ["NAME", "register"]

NAME = "gistkern"


def _attend(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    s_aux=None,
    softcap=None,
    gist_call=None,
    **kwargs,
):
    """``(out [B, N, Hq, D], None)``: gist-masked attention of one layer. `key` and `value` are the call's own rows.

    `sliding_window` and `s_aux` (learned sinks) are the layer's, under the names that transformers gives them.
    """
    if gist_call is None:
        raise RuntimeError(
            f"attn_implementation={NAME!r} needs the layout of the call, which gistkern.patch_llama(model) "
            "provides: patch the model instead of naming the implementation"
        )
    if dropout:
        raise ValueError(
            f"attention dropout is not supported, got {dropout}: load the model without, "
            "from_pretrained(path, attention_dropout=0.0)"
        )
    if softcap is not None:
        raise ValueError(f"soft-capping of attention scores is not supported, got softcap={softcap}")
    out = gist_call.attend(module.layer_idx, query, key, value, scaling, sliding_window, s_aux)
    return out.transpose(1, 2), None


def _padding_mask_only(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """The gist layout masks; transformers keeps the 2-D padding mask it was given."""
    return attention_mask


def register() -> None:
    """Make "gistkern" an attention implementation. There is no way to unregister one; it is harmless."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _padding_mask_only)
