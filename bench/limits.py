"""What a device can do at most, measured beside everything else: matrix products and a memory copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["copy", "matmul"]

# large enough for full speed, small enough for every round
SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = 256 << 20


def matmul(flops: float, device: str, dtype: torch.dtype, most: int = 16) -> tuple[Callable[[], Any], float]:
    """About `flops` operations of square matrix products (at most `most` products), and how many they really are."""
    size = SIZE[device]
    a, b, c = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    times = min(most, max(1, round(flops / (2 * size**3))))

    def products() -> None:
        for _ in range(times):
            torch.mm(a, b, out=c)

    return products, 2.0 * size**3 * times


def copy(device: str) -> tuple[Callable[[], Any], float]:
    """A copy that no cache holds, and the bytes that it reads and writes."""
    source, target = (torch.empty(COPY_BYTES // 4, device=device).fill_(1.0) for _ in range(2))
    return lambda: target.copy_(source), 2.0 * COPY_BYTES
