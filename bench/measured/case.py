"""A case: calls that compute the same, to be timed side by side, and why others are not among them."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.measured.timing import Call, interleaved, ratio

OURS = "ours"
# of whole models
FULL, PREFILL = "DynamicCache", "plain prefill"


@dataclass
class Case:
    """Calls by name, `OURS` among them, and the reasons of what is not measured.

    `limit` is the name of the call that stands for the device's peak; a call with `work` (FLOPs or bytes, of all calls
    or by name) would reach that peak in `work / limit_work` of its time. `repeat` is how many times each call is made
    in a row for one time: more than once where one alone is shorter than starting it. `queued` is that of
    `bench.measured.timing.spent`. Of calls that read or write `tokens` the speed is told too.
    """

    device: str
    calls: dict[str, Call]
    not_measured: dict[str, str] = field(default_factory=dict)
    limit: str = ""
    work: float | Mapping[str, float] = 0.0
    limit_work: float = 1.0
    repeat: int = 1
    queued: bool = False
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def serve(case: Case, name: str, make: Callable[[], Call], check: Callable[[Any], None]) -> None:
    """Add a call once it has answered what `check` lets pass; the reason among what is not measured if it cannot.

    One baseline that a machine refuses (out of memory, not compiled for its chip) must not lose the others' numbers.
    A wrong answer is no refusal: its AssertionError ends the report.
    """
    try:
        call = make()
        check(call())
    except (RuntimeError, ImportError, MemoryError) as error:
        case.not_measured[name] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    else:
        case.calls[name] = call


def measured(case: Case, rounds: int, warmup: int = 1) -> dict[str, Any]:
    """Ratios of every other call's time to ours, and our share of the limit; medians over the rounds.

    Rounds of `warmup` are not counted: none is needed where every call has been made before, to be checked.
    """
    # the limit takes as long as a call or longer: once a round is enough
    once = {case.limit: case.calls[case.limit]} if case.limit else {}
    calls = {name: call for name, call in case.calls.items() if name not in once}
    repeated = {name: _in_a_row(call, case.repeat) for name, call in calls.items()}
    seconds = interleaved(repeated | once, rounds, case.device, warmup, case.queued)
    others = [name for name in calls if name != OURS]
    found: dict[str, Any] = {"slower_than_ours": {name: ratio(seconds, name, OURS) for name in others}}
    if case.tokens:
        found["tokens per second"] = {name: case.tokens / statistics.median(seconds[name]) for name in calls}
    if case.device == "cuda":
        found["milliseconds"] = {name: 1e3 * statistics.median(seconds[name]) / case.repeat for name in calls}
    if case.limit:  # what share of the device's peak each call reaches, counting the work that the mask asks for
        work = case.work if isinstance(case.work, Mapping) else dict.fromkeys(calls, case.work)
        shares = {name: case.repeat * work[name] / case.limit_work for name in (OURS, *others)}
        found["of_limit"] = {name: ratio(seconds, case.limit, name, share) for name, share in shares.items()}
    return found | {"not_measured": case.not_measured, "rounds": len(seconds[OURS])}


def _in_a_row(call: Call, repeat: int) -> Call:
    def calls() -> Any:
        for _ in range(repeat):
            result = call()
        return result

    return call if repeat == 1 else calls
