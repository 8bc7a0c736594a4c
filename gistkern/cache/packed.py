"""Weights that bitsandbytes packs anew at their first use on a CPU: the bytes that they had before.

On processors with AVX512-BF16 a `Linear4bit` moves its nibbles about at its first forward
(`bitsandbytes.functional._convert_weight_packed_for_cpu`, read in 0.50), and a model would have two fingerprints: one
before, one after. Blocks of 32 rows are interleaved: of a pair of columns, the low nibbles of 32 bytes hold rows 0 to
15, the high ones rows 16 to 31.
"""

from __future__ import annotations

import torch

__all__ = ["is_packed", "sample_before_packing", "shape_before_packing"]

_ROWS = 32  # of a block, and bytes of a block's pair of columns


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether bitsandbytes has packed it for the CPU."""
    return bool(getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False))


def shape_before_packing(parameter: torch.Tensor) -> tuple[int, int]:
    """Of the bytes that the weight was loaded as."""
    return parameter.numel(), 1


def sample_before_packing(parameter: torch.Tensor, step: int) -> torch.Tensor:
    """Every `step`-th of the bytes that the weight was loaded as, uint8."""
    packed = parameter.detach().reshape(-1)
    pairs = parameter.quant_state.shape[1] // 2  # type: ignore[attr-defined]  # of columns, a byte each
    index = torch.arange(0, packed.numel(), step, device=packed.device)
    row, pair = index // pairs, index % pairs
    inside = row % _ROWS
    first = (row // _ROWS * pairs + pair) * _ROWS + 2 * inside % _ROWS
    shift = (inside >= _ROWS // 2).to(torch.uint8) * 4
    even, odd = (packed[place] >> shift & 15 for place in (first, first + 1))
    return even << 4 | odd
