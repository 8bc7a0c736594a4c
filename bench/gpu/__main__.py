"""The GPU script: stages in order of priority, each in a process with a limit of its own, within eight minutes.

    make gpu                                # on a GPU; into runs/gpu, and at the end into docs/results
    make gpu ARGS="--stage checks decoding" # some of it
    make gpu ARGS=--dry-run                 # all of it on a CPU in small, never into docs
    make gpu ARGS="--record runs/gpu"       # what a run elsewhere has left, into docs/results

After each row the report is written (gpu.json), so that a killed run leaves what it has; gpu.log has what stages print.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.fill import RESULTS
from bench.gpu.stages import EMULATED, LIMITS, OTHERS, STAGES
from bench.markdown import columns
from bench.measured.baselines import FLASH, installed
from bench.measured.report import header, merged, target_of, write
from bench.measured.tables import tables
from bench.rows import write_report
from gistkern.backends import native

MINUTES = 8.0
SLOWER = 4  # a rehearsal on a CPU that does other things
FEWEST = 5.0  # seconds; with less no stage begins
ROOT = Path(__file__).parents[2]


class Process(NamedTuple):
    """A stage: what is run, for how many seconds at most, and what its environment has beside ours."""

    command: list[str]
    limit: float
    environment: Mapping[str, str] = {}


def processes(names: list[str], dry: bool) -> dict[str, Process]:
    """The stages of these names."""
    grid = "rehearsal" if dry else "cuda"
    beside = {"OMP_NUM_THREADS": "1"} if dry else {}
    return {
        name: Process(
            [sys.executable, "-m", "bench.gpu.stages", name, grid],
            LIMITS.get(name, OTHERS) * (SLOWER if dry else 1),
            beside | (EMULATED if dry and name in ("hopper", "tiles") else {}),
        )
        for name in names
    }


def on_signals() -> None:
    """Whoever ends this process ends its stage too."""
    signal.signal(signal.SIGTERM, lambda *caught: sys.exit(143))


def run(stages: Mapping[str, Process], report: dict[str, Any], out: Path, seconds: float) -> bool:
    """Run stages into ``report[their names]``; whether all ended well.

    How each ended is a row of ``report["stages"]``. None runs beyond the `seconds` of all.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    report["stages"] = told = []

    def save() -> None:
        write_report(out / "gpu.part", report)
        (out / "gpu.part").replace(out / "gpu.json")

    with (out / "gpu.log").open("w") as log:
        for name, stage in stages.items():
            left = deadline - time.monotonic()
            if left < FEWEST:
                told.append(
                    {"stage": name, "seconds": 0.0, "limit": stage.limit, "rows": 0, "ended": "not begun: no time"}
                )
                continue
            stage = stage._replace(limit=min(stage.limit, left))
            print(f"== {name}", file=log, flush=True)
            rows = report[name] = []
            start = time.monotonic()
            ended = _run(stage, rows, save, log)
            taken = time.monotonic() - start
            told.append({"stage": name, "seconds": taken, "limit": stage.limit, "rows": len(rows), "ended": ended})
            print(f"{name}: {len(rows)} rows in {taken:.0f} s, {ended}", flush=True)
            save()
    save()
    return all(one["ended"] == "well" for one in told)


def _run(stage: Process, rows: list[dict[str, Any]], save: Callable[[], None], log: Any) -> str:
    """How a stage ended. It and whatever it has started end here."""
    process = subprocess.Popen(
        stage.command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, cwd=ROOT,
        env=os.environ | stage.environment,
    )  # fmt: skip

    def read() -> None:
        for line in process.stdout or ():
            row = json.loads(line)
            if rows and "file" in row:  # counts that go on
                rows[:] = [one for one in rows if one["file"] != row["file"]]
            rows.append(row)
            save()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait(stage.limit)
        ended = "well" if not status else f"failed, status {status}"
    except subprocess.TimeoutExpired:
        ended = f"stopped at its limit of {stage.limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(FEWEST)
    return ended


TOLD: dict[str, Any] = {
    "suite": {"file": "file", "passed": "passed", "skipped": "skipped", "failed": lambda row: len(row["failed"])},
    "checks": {"check": "check", "": lambda row: row.get("failed", "within the budget")},
    "hopper": {
        **{name: name for name in ("layout", "head_dim", "pass", "tile")},
        "of the plain": lambda row: f"{row['of the plain']:.2f}" if "of the plain" in row else "",
    },
}


def printed(report: Mapping[str, Any]) -> str:
    """All tables of a report, and last how its stages ended."""
    found = {name: columns(report.get(name, []), cells) for name, cells in TOLD.items() if report.get(name)}
    cells = {"stage": "stage", "ended": "ended", "seconds": lambda row: f"{row['seconds']:.0f}", "rows": "rows"}
    found |= tables(report)
    return "\n\n".join([*(f"{name}\n\n{table}" for name, table in found.items()), columns(report["stages"], cells, 2)])


def record(folder: Path) -> Path:
    """Put what a run has left into docs/results and its page."""
    report = json.loads((folder / "gpu.json").read_text("utf-8"))
    if report["device"].startswith("cpu"):
        raise SystemExit(f"{folder} holds a rehearsal: it says nothing about a GPU")
    path = target_of(report["device"], RESULTS)
    write(merged(report, json.loads(path.read_text("utf-8")) if path.exists() else {}), path)
    return path


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(LIMITS), help=", ".join(STAGES))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages (%(default)g; dry: four times)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="of gpu.json and gpu.log (runs/gpu)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--record", type=Path, metavar="DIR", help="run nothing: put that run's rows into docs/results")
    given = parser.parse_args(arguments)
    if given.record is not None:
        print(f"wrote {record(given.record)}")
        return 0
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry-run rehearses on the CPU")
    on_signals()
    device = "cpu" if given.dry_run else "cuda"
    report = header(device, "make gpu" if not given.dry_run else "make gpu ARGS=--dry-run")
    if given.dry_run:
        report |= {"device": "cpu, rehearsal", "grade": "emulated"}
    packages = FLASH | {"flashinfer": "flashinfer"}
    report["beside"] = {name: "there" if installed(package) else "absent" for name, package in packages.items()}
    report["beside"]["CUDA kernels of the extension"] = native.missing_cuda() or f"there, for {native.cuda_archs()}"
    for key in ("device", "machine", "versions", "beside"):
        print(f"{key}: {report[key]}", flush=True)
    well = run(
        processes(given.stage, given.dry_run), report, given.out, 60 * given.minutes * (SLOWER if given.dry_run else 1)
    )
    print(f"\n{printed(report)}")
    if not given.dry_run:
        print(f"\nwrote {record(given.out)}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
