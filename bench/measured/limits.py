"""What a device can do at most, measured beside everything else, and what fits on it."""

from collections.abc import Callable
from typing import Any

import torch

# large enough for full speed, small enough for every round
SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = 256 << 20
LARGEST_ON_CPU = 3 << 30


def largest(device: str | torch.device) -> int:
    """Bytes up to which one more tensor is made: a mask, scores, a cache that a step copies once more.

    On a GPU a third of its memory; on a CPU a constant, so that the report's rows do not depend on the machine.
    """
    device = torch.device(device)
    return LARGEST_ON_CPU if device.type == "cpu" else torch.cuda.mem_get_info(device)[1] // 3


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
