"""docs/evidence/compare.md and its plots from the report of compare.py.

python examples/compare_page.py docs/evidence/compare.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from metrics import wilson
from passkey.command_line import errors_as_one_line, input_file
from results import environment_line, read_json, table

__all__ = ["main", "page", "pooled", "write_page"]

Result = Mapping[str, Any]

_INTRO = """# Gist layouts compared

Grade **measured**: `{command}` on {environments}.

The same model for all (the tiny Llama with random weights, {parameters} parameters), English passkeys, and the same
budget: every configuration is trained from scratch on {rows} rows of token streams (context, gists, question, answer; a
layout that needs more rows per context sees fewer contexts), with the same optimiser, learning rate and curriculum of
lengths ({lengths} tokens; a stage ends when the running digit accuracy
passes its gate, at the latest after a fixed number of steps, and the last stage takes what is left of the budget). The
budget is small on purpose, so these are **not** the best accuracies that a layout can reach: they say what a layout
learns for the same work. The longest training context has {longest} tokens; longer ones are extrapolation.

Answers are greedy, from the cached gist rows alone; the context is compressed before the question is seen; keys and
part of the sentences were not seen in training, and all configurations answer the same questions. *Ratio* is tokens of
context per cached row. Intervals are 95 % (Wilson) over the questions, pooled over the seeds listed: they do not cover
other seeds, so the accuracy of each seed stands beside them.

*single*: the context is one segment. *segment-wise*: segments of {segment_length} tokens that overlap by
{segment_overlap}, each with gists of its own that stay, so the ratio hardly depends on the length. *hierarchical*: the
same segments write 8 gists each, and a summary of all of those is what stays."""

_CAPACITY = """## Capacity

Contexts of one length with 1 to 8 keys of 5 digits, each stated twice. With several keys every key is asked for by
name, and every key of a context is asked once; a single key has no name. One model per number of gists (single
segment), trained on {rows} rows with 1 to 8 keys. With digit accuracy a and K keys the digits recovered are
5 K (a - 0.1) / 0.9, which counts out guessing (0 is chance, less is worse), and *digits per row* divides that by the
cached rows. Its interval resamples contexts (bootstrap)."""

_NOT_RUN = """## Not run

These configurations of the grid were not run; nothing is known about them."""


def pooled(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Rows of one configuration's seeds together, by length: mean, Wilson interval, and each seed's own accuracy."""
    by_tokens: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for result in results:
        for row in result["rows"]:
            by_tokens.setdefault(row["tokens"], []).append((result["seed"], row))
    found = []
    for tokens, rows in sorted(by_tokens.items()):
        n = sum(row["n"] for _, row in rows)
        exact, digit = (sum(row[name] * row["n"] for _, row in rows) / n for name in ("exact", "digit"))
        low, high = wilson(round(exact * n), n)
        found.append(
            {"tokens": tokens, "gist_rows": rows[0][1]["gist_tokens"], "ratio": rows[0][1]["ratio"], "n": n}
            | {"exact": exact, "low": low, "high": high, "digit": digit}
            | {"seeds": {seed: row["exact"] for seed, row in rows}}
        )
    return found


def _plain(cell: Mapping[str, Any]) -> bool:
    return cell["positions"] == "gist_first" and not cell["sink_tokens"]


# title, file, the axis that is compared, which configurations
_SECTIONS: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("Layouts", "layouts", "layout", lambda cell: _plain(cell) and cell["gists"] == 10),
    ("Gists of a single segment", "gists-single", "gists", lambda cell: _plain(cell) and cell["layout"] == "single"),
    (
        "Gists per segment, segment-wise",
        "gists-segment-wise",
        "gists",
        lambda cell: _plain(cell) and cell["layout"] == "segment-wise",
    ),
    (
        "Summary gists, hierarchical",
        "gists-hierarchical",
        "gists",
        lambda cell: _plain(cell) and cell["layout"] == "hierarchical",
    ),
    ("Positions", "positions", "positions", lambda cell: cell["gists"] == 10 and not cell["sink_tokens"]),
    ("Sink", "sink", "sink_tokens", lambda cell: cell["gists"] == 10 and cell["positions"] == "gist_first"),
)


def _sections(report: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, list[dict[str, Any]]]]]:
    """Title, key and curves of the sections whose axis takes at least two values in the report."""
    for title, key, axis, wanted in _SECTIONS:
        chosen: dict[str, list[Result]] = {}
        for result in report["results"]:
            if "rows" in result and wanted(result["configuration"]):
                chosen.setdefault(result["name"], []).append(result)
        if len({results[0]["configuration"][axis] for results in chosen.values()}) > 1:
            yield title, key, {name: pooled(results) for name, results in chosen.items()}


def page(report: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The page of a report; `pictures` are the files of the sections' plots."""
    results = report["results"]
    parts = [_INTRO.format(**_facts(report))]
    for title, key, curves in _sections(report):
        parts += [f"## {title}", f"![exact match against ratio]({pictures[key]})", _accuracy_table(curves)]
    measured = [result for result in results if "capacity" in result]
    if measured:
        parts.append(_CAPACITY.format(rows=f"{measured[0]['budget']['rows']:,}"))
        parts += [f"![digits per row]({pictures['capacity']})", _capacity_table(measured)]
    parts += ["## Training", _training_table(results)]
    missing: dict[int, list[str]] = {}
    for name, seed in report["not_run"]:
        missing.setdefault(seed, []).append(name)
    if missing:
        lines = [f"- seed {seed}: {', '.join(names)}" for seed, names in missing.items()]
        parts += [_NOT_RUN, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    results = [result for result in report["results"] if "rows" in result] or report["results"]
    if not results:
        raise ValueError("the report holds no results: run examples/compare.py first")
    budget = results[0]["budget"]
    lengths = [f"{low} to {high}" for low, high in (stage["tokens"] for stage in budget["stages"])]
    parameters = sorted({result["parameters"] for result in results})
    segments = next((one["configuration"] for one in results if "segment_length" in one["configuration"]), {})
    return {
        "command": report["command"],
        "environments": "; ".join(environment_line(one) for one in report["environments"]),
        "parameters": " to ".join(f"{value:,}" for value in dict.fromkeys((parameters[0], parameters[-1]))),
        "rows": f"{budget['rows']:,}",
        "lengths": ", ".join(lengths),
        "longest": max(stage["tokens"][1] for stage in budget["stages"]),
        "segment_length": segments.get("segment_length", "no"),
        "segment_overlap": segments.get("segment_overlap", "none"),
    }


def _accuracy_table(curves: Mapping[str, list[dict[str, Any]]]) -> str:
    head = ["configuration", "tokens", "cached rows", "ratio", "n", "exact match", "95 % interval", "digits", "by seed"]
    lines = []
    for name, rows in curves.items():
        for row in rows:
            seeds = ", ".join(f"{seed}: {exact:.0%}" for seed, exact in sorted(row["seeds"].items()))
            counts = name, f"{row['tokens']:,}", row["gist_rows"], f"{row['ratio']:.1f}x", row["n"]
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            lines.append([*counts, f"{row['exact']:.1%}", interval, f"{row['digit']:.1%}", seeds])
    return "\n".join(table(head, lines))


def _capacity_table(results: Sequence[Result]) -> str:
    head = ["configuration", "seed", "keys", "tokens", "cached rows", "questions", "exact match", "95 % interval"]
    head += ["digits", "digits per row", "95 % interval"]
    lines = []
    for result in results:
        for row in result["capacity"]:
            counts = row["keys"], row["tokens"], f"{row['gist_rows']:g}", row["keys"] * row["contexts"]
            exact = f"{row['exact']:.1%}", f"{row['wilson_low']:.1%} to {row['wilson_high']:.1%}"
            digits = f"{row['digit']:.1%}", f"{row['digits_per_row']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"
            lines.append([result["name"], result["seed"], *counts, *exact, *digits])
    return "\n".join(table(head, lines))


def _training_table(results: Sequence[Result]) -> str:
    head = ["configuration", "seed", "steps", "rows", "contexts", "last stage entered at row", "digits at the end"]
    lines = []
    for result in results:
        training, stages = result["training"], len(result["budget"]["stages"])
        entered = training["stages_entered_at"]
        last = f"{entered[-1]['rows']:,}" if len(entered) == stages else f"never (stage {len(entered)} of {stages})"
        counts = training["steps"], f"{training['rows']:,}", f"{training['contexts']:,}"
        lines.append([result["name"], result["seed"], *counts, last, f"{training['running_digit_accuracy']:.1%}"])
    return "\n".join(table(head, lines))


def write_page(report: Mapping[str, Any], path: Path) -> None:
    """Write the page, and beside it a plot per section that compares at least two configurations."""
    pictures = {key: f"{path.stem}-{key}.png" for key in (*(key for _, key, *_ in _SECTIONS), "capacity")}
    text = page(report, pictures)
    for _, key, curves in _sections(report):
        _plot_accuracy(curves, path.parent / pictures[key])
    measured = [result for result in report["results"] if "capacity" in result]
    if measured:
        _plot_capacity(measured, path.parent / pictures["capacity"])
    path.write_text(text, "utf-8")


def _plot_accuracy(curves: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for name, rows in curves.items():
        exact = [row["exact"] for row in rows]
        error = [[row["exact"] - row["low"] for row in rows], [row["high"] - row["exact"] for row in rows]]
        ratio = [row["ratio"] for row in rows]
        # rounding can leave an end of the interval a hair inside the point
        axes.errorbar(
            ratio, exact, [[max(0.0, one) for one in side] for side in error], marker="o", capsize=3, label=name
        )
    axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="ratio (tokens / cached rows)", ylabel="exact match")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_capacity(results: Sequence[Result], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for result in results:
        rows = result["capacity"]
        value = [row["digits_per_row"] for row in rows]
        error = [
            [row["digits_per_row"] - row["low"] for row in rows],
            [row["high"] - row["digits_per_row"] for row in rows],
        ]
        label = f"{result['configuration']['gists']} gists, seed {result['seed']}"
        axes.errorbar([row["keys"] for row in rows], value, error, marker="o", capsize=3, label=label)
    axes.set(xlabel="keys per context", ylabel="digits recovered per cached row")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=input_file, metavar="REPORT.json")
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        report = read_json(given.report)
        try:
            write_page(report, given.report.with_suffix(".md"))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{given.report} is no report of compare.py: {error!r}") from error


if __name__ == "__main__":
    main()
