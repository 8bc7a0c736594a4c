"""Gist layouts compared: one model, curriculum and budget of steps; every configuration trained from scratch.

    python examples/compare.py --list
    python examples/compare.py --seeds 0 1              # the whole grid; what is finished is not run again
    python examples/compare.py --only single-10 --only hierarchical-10

A configuration is what it changes in a preset (passkey/compare.yaml). Each is trained and evaluated as train_niah.py
does it, in runs/compare/<name>-seed<N>, where a killed run goes on; runs/compare/compare.json has a row of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passkey.command_line import at_least, errors_as_one_line, input_file, output_folder
from passkey.report import command_line, read_json, write_json

if TYPE_CHECKING:
    from passkey.settings import Settings

__all__ = ["digits_per_row", "main"]

GRID = Path(__file__).parent / "passkey" / "compare.yaml"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="one configuration; repeatable")
    parser.add_argument("--list", action="store_true", help="name the configurations and say which are finished")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0])
    parser.add_argument("--grid", type=input_file, default=GRID, help="configurations, a .yaml")
    parser.add_argument("--runs", type=output_folder, default=Path("runs/compare"), help="folder of runs and report")
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        _run(given, command_line("compare.py", arguments))


def _run(given: argparse.Namespace, command: str) -> None:
    # here and below: what takes seconds to load, and a wrong argument is refused without
    from passkey.settings import read_yaml, settings_of

    grid = read_yaml(given.grid)
    if not isinstance(grid, dict):
        raise ValueError(f"{given.grid} must be a mapping of names to what they change in a preset")
    if unknown := [name for name in given.only or () if name not in grid]:
        raise ValueError(f"no configuration {unknown[0]!r}: expected one of {', '.join(grid)}")
    for seed, name in product(given.seeds, given.only or grid):
        settings, run = settings_of(name, grid[name], f"{given.grid}, {name}", seed), given.runs / f"{name}-seed{seed}"
        if given.list:
            print(f"{name:32} seed {seed}  {'finished' if (run / 'report.json').exists() else 'to run'}")
            continue
        _train_and_evaluate(settings, run)
        reports = map(read_json, sorted(given.runs.glob("*-seed*/report.json")))
        results = [_result(report) for report in reports]
        write_json(given.runs / "compare.json", {"grade": "measured", "command": command, "results": results})


def _train_and_evaluate(settings: Settings, run: Path) -> None:
    """What is left to do of a run, of which other settings are refused."""
    import torch

    from evaluation import evaluate_run
    from passkey.trained import newest_whole, open_trained
    from passkey.training import train

    torch.set_num_threads(1)  # fastest for a model this small
    begun = newest_whole(run) is not None
    train(settings, run, resume=begun, overwrite=not begun)
    if not (run / "report.json").exists():
        evaluate_run(open_trained(run), run)


def _result(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the comparison keeps of a run's report."""
    rows = [{**row, "digits_per_row": digits_per_row(row)} for row in report["rows"]]
    for row in rows:
        del row["by_depth"]
    kept = {name: report[name] for name in ("seed", "evaluation_seed", "training", "environment")}
    return {"name": report["preset"], "parameters": report["model"]["parameters"], **kept, "rows": rows}


def digits_per_row(row: Mapping[str, Any]) -> float:
    """Digits of all keys of a context that a cached row carries; guesses, one hit in ten digits, are counted out."""
    from passkey.niah import KEY_DIGITS

    return row["keys"] * KEY_DIGITS * (row["digit"] - 0.1) / 0.9 / row["gist_tokens"]


if __name__ == "__main__":
    main()
