"""Gist layouts compared: one model, curriculum and budget of steps; every configuration trained from scratch.

    python examples/compare.py --list
    python examples/compare.py --seeds 0 1              # the whole grid; what is finished is not run again
    python examples/compare.py --only single-10 --only hierarchical-10

A configuration is what it changes in a preset (passkey/compare.yaml). Each is trained in runs/compare/<name>-seed<N>,
where a killed run goes on, and asked its preset's questions: a row of runs/compare/compare.json.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passkey.command_line import at_least, errors_as_one_line, input_file, output_folder
from passkey.report import command_line, environment, read_json, show, write_json

if TYPE_CHECKING:
    from passkey.settings import Settings

__all__ = ["digits_per_row", "main", "trained_and_asked"]

GRID = Path(__file__).parent / "passkey" / "compare.yaml"
EVALUATION_SEED = 1
READ_TOGETHER = 20


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
    out = given.runs / "compare.json"
    found = read_json(out, "results")["results"] if out.exists() else []
    done = {(result["seed"], result["name"]): result for result in found}
    for seed, name in product(given.seeds, given.only or grid):
        settings, result = settings_of(name, grid[name], f"{given.grid}, {name}", seed), done.get((seed, name))
        if result is not None and result["settings"] != digest(settings):
            raise ValueError(f"{out} has {name} with other settings: delete it, or pass another --runs folder")
        if given.list:
            print(f"{name:32} seed {seed}  {'to run' if result is None else 'finished'}")
        elif result is None:
            done[seed, name] = trained_and_asked(settings, given.runs / f"{name}-seed{seed}")
            about = {"grade": "measured", "command": command}
            about["environments"] = [environment("gistkern", "torch", "transformers")]
            write_json(out, {**about, "results": [*done.values()]})


def trained_and_asked(settings: Settings, run: Path) -> dict[str, Any]:
    """Train and ask one configuration: its row of the report."""
    import torch

    from evaluation import answer_samples, first_of
    from passkey.metrics import rows_of
    from passkey.trained import newest_whole, open_trained
    from passkey.training import train

    torch.set_num_threads(1)  # fastest for a model this small
    killed = newest_whole(run) is not None
    train(settings, run, resume=killed, overwrite=not killed)
    trained = open_trained(run)
    samples = first_of(trained.datasets(EVALUATION_SEED))
    answers = answer_samples(trained.reader(), samples, batch=READ_TOGETHER, show=settings.name)
    rows = [{key: value for key, value in row.items() if key != "by_depth"} for row in rows_of(answers)]
    print(show([{"method": f"{settings.name}, seed {settings.seed}", **row} for row in rows]))
    if capacity := any(row["keys"] > 1 for row in rows):
        rows = [{**row, "digits_per_row": digits_per_row(row)} for row in rows]
    return {
        "name": settings.name,
        "seed": settings.seed,
        "settings": digest(settings),
        "evaluation_seed": EVALUATION_SEED,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "training": trained.about["training"],
        "capacity" if capacity else "rows": rows,
    }


def digits_per_row(row: Mapping[str, Any]) -> float:
    """Digits of all keys of a context that a cached row carries; guesses, one hit in ten digits, are counted out."""
    from passkey.niah import KEY_DIGITS

    return row["keys"] * KEY_DIGITS * (row["digit"] - 0.1) / 0.9 / row["gist_tokens"]


def digest(settings: Settings) -> str:
    """What tells results of other settings."""
    return hashlib.sha256(settings.written().encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
