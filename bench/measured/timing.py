"""Times that can be compared: every call of a round follows the other, so that they share the machine's noise.

And what a device can do at most, measured beside everything else, and what fits on it.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

FEWEST = 3  # rounds, however long they take
PATIENCE = 25.0  # seconds after which no further round begins
AHEAD_BYTES, AHEAD_TIMES = 2 << 30, 2  # written before what is timed on a GPU: longer than queueing a call takes

Call = Callable[[], Any]
Seconds = Mapping[str, list[float]]


def finished(call: Call, device: str) -> Call:
    """The call until the device is done with it, not until it is queued."""
    if device == "cpu":
        return call

    def waits() -> Any:
        result = call()
        torch.cuda.synchronize()
        return result

    return waits


def spent(call: Call, device: str, queued: bool = False) -> float:
    """Seconds until the device is done with a call; with `queued` only those in which the device has work of it.

    A model's layers are queued ahead of a GPU: what the host takes for one is hidden by the one before.
    """
    if device == "cuda" and queued:
        return _on_gpu(call)
    whole = finished(call, device)
    start = time.perf_counter()
    whole()
    return time.perf_counter() - start


def _on_gpu(call: Call) -> float:
    """Between two events on the device, behind work that empties its caches and lasts while the host queues."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(AHEAD_TIMES):
        _ahead().zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@lru_cache(maxsize=1)
def _ahead() -> torch.Tensor:
    return torch.empty(AHEAD_BYTES, dtype=torch.uint8, device="cuda")


def captured(call: Call, device: str) -> Call:
    """On a GPU a replay of the call's CUDA graph, as engines decode; for what runs shorter than it takes to launch."""
    if device == "cpu":
        return call
    call()  # whatever happens once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def interleaved(
    calls: Mapping[str, Call], rounds: int, device: str = "cpu", warmup: int = 1, queued: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call in each round (as `spent` takes them), in the order of the rounds.

    Every round begins with another call: what one leaves in the caches is not always found by the same next one. There
    are `rounds` of them, or fewer (at least `FEWEST`) when they take longer than `PATIENCE`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    begun = time.perf_counter()
    for round_ in range(-warmup, rounds):
        if round_ >= FEWEST and time.perf_counter() - begun > PATIENCE:
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            taken = spent(calls[name], device, queued)
            if round_ >= 0:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: Seconds, above: str, below: str, factor: float = 1.0) -> dict[str, float]:
    """Median, smallest and largest of ``factor * above / below`` over the rounds."""
    ratios = [factor * a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


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
