"""Torch's own causal attention (cuDNN or flash), for layouts that hide nothing (`GistLayout.plain`)."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from gistkern.rows import dense_rows

__all__ = ["attend"]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Output ``[B, Hq, N, D]`` of rows that each see all rows up to their own; k, v ``[B, Hkv, N, D]``.

    Differentiable by torch, of which the gradients are summed in no fixed order on a GPU. The kernels take any strides
    but that of D.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):  # would compute in autocast's type, not in the tensors'
        with torch.autocast(device, enabled=False):
            return _causal(q, k, v, scale)
    return _causal(q, k, v, scale)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
