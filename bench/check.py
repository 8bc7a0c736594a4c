"""Compare this machine's ratios with the recorded ones: a guard against regressions, outside CI's pass and fail.

    make bench-check                                   # the quicker rows of docs/benchmarks.json, again
    python -m bench.check --recorded docs/benchmarks-nvidia-h100.json --device cuda

A row has regressed where the largest of its new ratios (a baseline's time / ours) is below the recorded median by more
than the tolerance, and below the smallest recorded ratio. The exit status is the number of such rows, at most 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.attention import attention_case
from bench.case import measured
from bench.decoding import decoding_case
from bench.report import DOCS, device_name

__all__ = ["main", "regressions"]

MOST_ROWS = 4096
TOLERANCE = 0.2
Ratios = Mapping[str, Mapping[str, float]]


def regressions(recorded: Ratios, again: Ratios, tolerance: float = TOLERANCE) -> dict[str, tuple[float, float]]:
    """Baselines whose lead has shrunk: the recorded median and the largest new ratio."""
    found = {}
    for name in recorded.keys() & again.keys():
        best = again[name]["max"]
        if best < (1 - tolerance) * recorded[name]["median"] and best < recorded[name]["min"]:
            found[name] = recorded[name]["median"], best
    return found


def _quick(report: Mapping[str, Any], device: str, rounds: int) -> Iterator[tuple[str, Ratios, Ratios]]:
    """Title, recorded ratios and new ratios of each row that is quick to measure."""
    attention = [row for row in report["attention"] if row["rows"] <= MOST_ROWS]
    for row in tqdm(attention, desc="attention", disable=None):
        names = [name for name in row["slower_than_ours"] if "flex" not in name]  # minutes of compiling
        case = attention_case(row["layout"], row["rows"], row["heads"], row["pass"], device, names)
        title = f"{row['layout']}, {row['rows']} rows, {row['heads']}, {row['pass']}"
        yield title, row["slower_than_ours"], measured(case, rounds)["slower_than_ours"]
    for row in tqdm(report["decoding"], desc="decoding", disable=None):
        sizes = row["gist rows"], row["tail rows"], row["batch"]
        case = decoding_case(*sizes, row["heads"], device, list(row["slower_than_ours"]))
        title = "decoding, {} gist rows, {} tail rows, batch {}".format(*sizes)
        yield title, row["slower_than_ours"], measured(case, 4 * rounds)["slower_than_ours"]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=DOCS / "benchmarks.json")
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
    failed = 0
    for title, recorded, again in _quick(report, given.device, given.rounds):
        lost = regressions(recorded, again, given.tolerance)
        failed += bool(lost)
        for name, (before, now) in lost.items():
            print(f"{title}: {name} took {before:.2f} times our time when recorded, now at most {now:.2f}")
    print(f"{failed} row(s) have regressed" if failed else "no row has regressed")
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
