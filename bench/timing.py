"""Times that can be compared: every call of a round follows the other, so that they share the machine's noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["FEWEST", "PATIENCE", "finished", "interleaved", "ratio"]

FEWEST = 3  # rounds, however long they take
PATIENCE = 25.0  # seconds after which no further round begins

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


def interleaved(calls: Mapping[str, Call], rounds: int, device: str = "cpu", warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in each round, in the order of the rounds.

    Every round begins with another call: what one leaves in the caches is not always found by the same next one. There
    are `rounds` of them, or fewer (at least `FEWEST`) when they take longer than `PATIENCE`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    timed = {name: finished(call, device) for name, call in calls.items()}
    names = list(timed)
    begun = time.perf_counter()
    for round_ in range(-warmup, rounds):
        if round_ >= FEWEST and time.perf_counter() - begun > PATIENCE:
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            timed[name]()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Seconds, above: str, below: str, factor: float = 1.0) -> dict[str, float]:
    """Median, smallest and largest of ``factor * above / below`` over the rounds."""
    ratios = [factor * a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
