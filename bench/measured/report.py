"""Measure everything on this CPU, write docs/results/cpu.json, and fill its tables of docs/results.md.

    make bench-report                                  # one thread (40 minutes on a quiet machine)
    make bench-check                                   # the quicker rows again, against the recorded ones
    python -m bench.measured.report --section decoding  # a part of it, printed only

Every number is a ratio of medians over interleaved rounds: absolute times of a shared machine mean nothing. The same
sections on a GPU: `make gpu`.
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.fill import RESULTS, fill_results
from bench.measured.grid import GRIDS, Grid, quick
from bench.measured.sections import BESIDE, SECTIONS, beside
from bench.measured.tables import tables
from bench.rows import write_report
from gistkern.backends import native

# beside our own: whose speed the baselines depend on
PACKAGES = ("gistkern", "torch", "transformers", "triton", "peft", "flash-attn", "flash-attn-3", "flash-attn-4")
PACKAGES += ("flashinfer-python",)
TOLERANCE = 0.2


def header(device: str, command: str) -> dict[str, Any]:
    """What a report was measured with, and on what."""
    return {
        "grade": "measured",
        "command": command,
        "device": device_name(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "instruction_set": native.instruction_set() if device == "cpu" and native.missing() is None else None,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }


def measure(rounds: int, sections: list[str]) -> Iterator[dict[str, Any]]:
    """The report of some sections on this CPU: once more after each of them, whatever follows."""
    report = header("cpu", "make bench-report") | {"rounds": rounds}
    for name in sections:
        report[name] = list(SECTIONS[name](GRIDS["cpu"], "cpu", rounds))
        yield report


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    return torch.cuda.get_device_name() if device == "cuda" else _processor()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", facts.read_text() if facts.exists() else "")
    return named[1] if named else platform.processor() or "unknown processor"


def target_of(device: str, folder: Path) -> Path:
    """The report of a device by its name."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def merged(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """A report with the sections of an older one that it did not measure; its notes say which those are."""
    kept = {name: rows for name, rows in old.items() if name in SECTIONS and rows and not new.get(name)}
    if not kept:
        return new
    versions = ", ".join(f"{name} {number}" for name, number in old["versions"].items())
    note = f"From before: {', '.join(kept)}: `{old['command']}`; {versions}."
    return new | {"notes": [*new.get("notes", []), note, *old.get("notes", [])]} | kept


def write(report: dict[str, Any], path: Path) -> None:
    """The report, and its tables on the page of all results."""
    write_report(path, report)
    fill_results(path, tables(report))


def lost(recorded: Mapping[str, Mapping[str, float]], again: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Baselines whose lead has shrunk: below the recorded median less the tolerance and below the smallest recorded."""
    found = []
    for name, before in recorded.items():
        now = again[name]["median"] if name in again else 0.0
        if now < (1 - TOLERANCE) * before["median"] and now < before["min"]:
            said = f"now takes {now:.2f}" if name in again else "is not measured any more"
            found.append(f"{name} took {before['median']:.2f} times our time when recorded, {said}")
    return found


def regressions(report: Mapping[str, Any], grid: Grid, rounds: int) -> Iterator[str]:
    """What has been lost since a report was recorded, of the rows of a grid; rows it lacks have lost nothing."""
    for section, (keys, *_) in BESIDE.items():
        known = {tuple(row[key] for key in keys): row["slower_than_ours"] for row in report.get(section, [])}
        for row in beside(section, grid, "cpu", rounds):
            place = tuple(row[key] for key in keys)
            recorded = known.get(place, {})
            if section == "attention":
                recorded = {name: ratio for name, ratio in recorded.items() if name in grid.baselines}
            yield from (
                f"{section}, {', '.join(map(str, place))}: {one}" for one in lost(recorded, row["slower_than_ours"])
            )


def check(path: Path, rounds: int) -> None:
    """Print what has been lost, and leave with status 1 if anything has: a guard outside CI's pass and fail."""
    report = json.loads(path.read_text("utf-8"))
    if report["device"] != (here := device_name("cpu")):
        print(f"recorded on {report['device']}, this is {here}: ratios may differ for that reason alone")
    found = list(regressions(report, quick(GRIDS["cpu"]), rounds))
    print("\n".join(found) or "nothing has regressed")
    raise SystemExit(bool(found))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="repeatable; nothing is written")
    parser.add_argument("--check", action="store_true", help="compare with what is recorded, write nothing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    path = RESULTS / "cpu.json"
    if given.check:
        check(path, given.rounds)
    for report in measure(given.rounds, given.section or list(SECTIONS)):
        if not given.section:
            write_report(path, report)
    if given.section:
        print("\n\n".join(tables(report).values()))
    else:
        write(report, path)


if __name__ == "__main__":
    main()
