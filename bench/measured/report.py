"""Measure everything in one process, write docs/results/cpu.json, and fill its tables of docs/results.md.

    make bench-report                                  # on this CPU, one thread (40 minutes on a quiet machine)
    python -m bench.measured.report --device cuda       # the same for a GPU: docs/results/<its name>.json
    python -m bench.measured.report --section decoding  # a part of it, printed only

Every number is a ratio of medians over interleaved rounds: absolute times of a shared machine mean nothing.
"""

import argparse
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.fill import RESULTS, fill_results
from bench.measured.grid import GRIDS
from bench.measured.sections import SECTIONS
from bench.measured.tables import tables
from bench.rows import write_report
from gistkern.backends import native

# beside our own: whose speed the baselines depend on
PACKAGES = ("gistkern", "torch", "transformers", "triton", "flash-attn", "flash-attn-3")


def measure(device: str, rounds: int, sections: list[str]) -> Iterator[dict[str, Any]]:
    """The report of some sections, with what it was measured on: once more after each of them, whatever follows."""
    command = "make bench-report" if device == "cpu" else f"python -m bench.measured.report --device {device}"
    report: dict[str, Any] = {
        "grade": "measured",
        "command": command,
        "device": device_name(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "instruction_set": native.instruction_set() if device == "cpu" else None,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "rounds": rounds,
    }
    for name in sections:
        report[name] = SECTIONS[name](GRIDS[device], device, rounds)
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


def _target(device: str) -> Path:
    if device == "cpu":
        return RESULTS / "cpu.json"
    slug = re.sub("[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{slug}.json"


def write(report: dict[str, Any], path: Path) -> None:
    """The report, and its tables on the page of all results."""
    write_report(path, report)
    fill_results(path, tables(report))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=sorted(GRIDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="repeatable; nothing is written")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    torch.set_num_threads(given.threads)
    for report in measure(given.device, given.rounds, given.section or list(SECTIONS)):
        if not given.section:
            write_report(_target(given.device), report)
    if given.section:
        print("\n\n".join(tables(report).values()))
    else:
        write(report, _target(given.device))


if __name__ == "__main__":
    main()
