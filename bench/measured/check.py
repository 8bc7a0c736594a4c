"""Compare this machine's ratios with the recorded ones: a guard against regressions, outside CI's pass and fail.

    make bench-check                                   # the quicker rows of docs/results/cpu.json, again
    python -m bench.measured.check --recorded docs/results/nvidia-h100-80gb-hbm3.json --device cuda

A row has regressed where the median of a baseline's new ratios (its time / ours) is below the recorded median by more
than the tolerance, and below the smallest recorded ratio, or where a baseline that was measured is not any more. The
exit status is 1 if there is such a row.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.fill import DOCS
from bench.measured.grid import GRIDS, Grid, quick
from bench.measured.report import device_name
from bench.measured.sections import BESIDE, beside

TOLERANCE = 0.2
Ratios = Mapping[str, Mapping[str, float]]


def regressions(recorded: Ratios, again: Ratios, tolerance: float = TOLERANCE) -> dict[str, tuple[float, float | None]]:
    """Baselines whose lead has shrunk: the recorded median and the new one, None where it was not measured."""
    found: dict[str, tuple[float, float | None]] = {}
    for name, before in recorded.items():
        now = again[name]["median"] if name in again else None
        if now is None or (now < (1 - tolerance) * before["median"] and now < before["min"]):
            found[name] = before["median"], now
    return found


def compared(
    report: Mapping[str, Any], grid: Grid, device: str, rounds: int
) -> Iterator[tuple[str, Ratios | None, Ratios]]:
    """Title, recorded ratios (None where there are none) and new ratios of every row of a grid."""
    for section, (keys, *_) in BESIDE.items():
        known = {tuple(row[key] for key in keys): row["slower_than_ours"] for row in report.get(section, [])}
        for row in beside(section, grid, device, rounds):
            place = tuple(row[key] for key in keys)
            recorded = known.get(place)
            if recorded is not None and section == "attention":
                recorded = {name: ratio for name, ratio in recorded.items() if name in grid.baselines}
            title = ", ".join(
                f"{value} {key}" if isinstance(value, int) else str(value)
                for key, value in zip(keys, place, strict=True)
            )
            yield f"{section}: {title}", recorded, row["slower_than_ours"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=DOCS / "results" / "cpu.json")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    given = parser.parse_args(arguments)
    try:
        report = json.loads(given.recorded.read_text("utf-8"))
    except OSError as error:
        parser.error(f"{given.recorded} cannot be read ({error.strerror}): run make bench-report first")
    torch.set_num_threads(report["threads"])
    if report["device"] != (here := device_name(given.device)):
        print(f"recorded on {report['device']}, this is {here}: ratios may differ for that reason alone")
    failed = rows = 0
    for title, recorded, again in compared(report, quick(GRIDS[given.device]), given.device, given.rounds):
        if recorded is None:
            print(f"{title}: not recorded")
            continue
        lost = regressions(recorded, again, given.tolerance)
        rows += 1
        failed += bool(lost)
        for name, (before, now) in lost.items():
            found = "is not measured any more" if now is None else f"now takes {now:.2f}"
            print(f"{title}: {name} took {before:.2f} times our time when recorded, {found}")
    print(f"{failed} of {rows} rows have regressed")
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
