"""The two functions registered with transformers under the name "gistkern"."""

from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gistkern.distributed.attention import parallel_attention
from gistkern.ops.attention import gist_attention

__all__ = ["NAME", "register"]

NAME = "gistkern"


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, gist_call=None, **kwargs):
    """``(out [B, N, Hq, D], None)``: gist-masked attention of one layer. `key` starts with the past rows."""
    if gist_call is None:
        raise RuntimeError(
            f"attn_implementation={NAME!r} needs the layout of the call, which gistkern.patch_llama(model) "
            "provides: patch the model instead of naming the implementation"
        )
    if dropout:
        raise ValueError(f"attention dropout is not supported, got {dropout}: set config.attention_dropout=0")
    layout, backend = gist_call.layout_on(query.device), gist_call.backend
    if gist_call.shared is not None:
        shared_out = gist_call.shared.attend(module.layer_idx, query, key, value, layout, scaling, backend)
        return shared_out.transpose(1, 2), None
    if torch.is_autocast_enabled(value.device.type):  # the rotation promotes queries and keys to fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if gist_call.parallel is not None:
        shard, group = gist_call.parallel.shard, gist_call.parallel.group
        out = parallel_attention(query, key, value, shard, group, scale=scaling, backend=backend)
        return out.transpose(1, 2), None
    past_key, past_value = (t[:, :, : layout.past] if layout.past else None for t in (key, value))
    out = gist_attention(  # type: ignore[assignment]
        query,
        key[:, :, layout.past :],
        value[:, :, layout.past :],
        layout,
        past_key=past_key,
        past_value=past_value,
        scale=scaling,
        backend=backend,
    )
    return out.transpose(1, 2), None


def _padding_mask_only(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    """The gist layout masks; transformers keeps the 2-D padding mask it was given."""
    return attention_mask


def register() -> None:
    """Make "gistkern" an attention implementation. There is no way to unregister one; it is harmless."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _padding_mask_only)
