"""A case: calls that compute the same, to be timed side by side, and why others are not among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.timing import Call, Seconds, interleaved, ratio

__all__ = ["OURS", "Case", "measured"]

OURS = "ours"


@dataclass
class Case:
    """Calls by name, `OURS` among them, and the reasons of what is not measured.

    `limit` is the name of the call that stands for the device's peak; a call of ours with `work` (FLOPs or bytes)
    would reach that peak in `work / limit_work` of its time.
    """

    device: str
    calls: dict[str, Call]
    not_measured: dict[str, str] = field(default_factory=dict)
    limit: str = ""
    work: float = 0.0
    limit_work: float = 1.0


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Ratios of every other call's time to ours, and our share of the limit; medians over the rounds."""
    seconds = interleaved(case.calls, rounds, case.device)
    others = [name for name in case.calls if name not in (OURS, case.limit)]
    found: dict[str, Any] = {"slower_than_ours": {name: ratio(seconds, name, OURS) for name in others}}
    if case.limit:
        found["of_limit"] = share_of_limit(case, seconds, [OURS, *others])
    return found | {"not_measured": case.not_measured, "rounds": rounds}


def share_of_limit(case: Case, seconds: Seconds, names: Sequence[str]) -> Mapping[str, Any]:
    """What share of the device's peak each call reaches, counting the work that the mask asks for."""
    return {name: ratio(seconds, case.limit, name, case.work / case.limit_work) for name in names}
