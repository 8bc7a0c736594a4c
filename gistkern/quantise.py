"""INT8 and FP8 (e4m3) rows with one scale per token and head: ``scale = max|x| / 127`` (or ``/ 448``).

The specification of what csrc/ quantises, and what the backends without the extension use. The scheme is
per-token symmetric quantisation as in KV caches of serving engines (Xiao et al. 2022, "SmoothQuant", section 2).
"""

from __future__ import annotations

import torch

__all__ = ["LARGEST", "dequantise", "quantise"]

# the largest magnitude each element type holds
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements ``[..., D]`` of `dtype`, rounded to nearest even, and fp32 scales ``[...]``, 0 for a row of zeros."""
    wide = rows.float()
    scale = wide.abs().amax(-1) / LARGEST[dtype]
    value = torch.where(scale[..., None] == 0, 0.0, wide / scale[..., None])
    if dtype == torch.int8:
        value = value.round()
    # a tiny row's scale is rounded to one of few subnormals, possibly down: its largest element is then beyond the type
    return value.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def dequantise(rows: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The rows as `dtype`; `scale` None where they are not quantised."""
    if scale is None:
        return rows.to(dtype)
    return (rows.float() * scale[..., None]).to(dtype)
