"""Reports: JSON for programs, Markdown and pictures for people; several of them beside the proof of concept.

    python examples/report.py runs/tiny/report.json runs/tiny-seed1/report.json --out docs/evidence/tiny

writes docs/evidence/tiny.md and, beside it, tiny-ratio.png, tiny-kv.png and tiny-depth.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from passkey.command_line import errors_as_one_line, output_file
from plots import accuracy_against_ratio, depth_map, kv_bytes, label
from poc import NAME, ROWS, TARGET
from results import environment, environment_line, read_json, table, write_json

__all__ = ["comparison", "main", "markdown", "read_report", "write_report"]


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.md, heatmap.png, accuracy.png and kv_bytes.png, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    report["environment"] = environment("gistkern", "torch", "transformers")
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    rows = {report["preset"]: report["rows"]}
    depth_map(rows, folder / "heatmap.png")
    accuracy_against_ratio(rows, folder / "accuracy.png")
    kv_bytes(rows, folder / "kv_bytes.png")
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    lines = [f"# {report['preset']}: {report['checkpoint']}", "", f"{report['decoding']}.", "", *_rows(report["rows"])]
    if report.get("full_context"):
        lines += ["", "The same questions with the whole context in sight:", "", *_rows(report["full_context"])]
    lines += ["", "Metrics: docs/metrics.md."]
    if swap := report.get("swap"):
        lines += [
            "",
            f"Swap test (n={swap['n']}): with another sample's cache the answer is that sample's key in "
            f"{swap['answers_of_the_swapped_cache']:.0%} and the own context's key in "
            f"{swap['answers_of_the_own_context']:.0%}.",
        ]
    for row in report.get("context_visible", []):
        lines += ["", f"With the context still in sight ({row['language']}, n={row['n']}): exact {row['exact']:.1%}."]
    if report.get("side_by_side"):
        lines += ["", *_side_by_side(report["side_by_side"])]
    if cost := report.get("training"):
        parts = [f"{cost['steps']:,} steps"]
        parts += [f"{cost['tokens']:,} rows of token streams"] if "tokens" in cost else []
        parts += [f"{cost['cpu_seconds'] / 60:,.1f} CPU minutes"] if cost.get("cpu_seconds") else []
        lines += ["", f"Trained: {', '.join(parts)}."]
    lines += ["", f"Evaluated: {_provenance(report)}."]
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    header = (
        "questions",
        "tokens",
        "cached rows",
        "ratio",
        "KV bytes, full",
        "gist",
        "n",
        "exact",
        "95 % interval",
        "chance",
        "digits",
        "hallucinated: from the context",
        "invented",
        "abstained",
    )
    return table(
        header,
        [
            [
                label(row),
                f"{row['tokens']:,}",
                f"{row['gist_tokens']:,}",
                f"{row['ratio']:.0f}x",
                f"{row['full_kv_bytes']:,}",
                f"{row['gist_kv_bytes']:,}",
                str(row["n"]),
                f"{row['exact']:.1%}",
                f"{row['wilson_low']:.1%} to {row['wilson_high']:.1%}",
                f"{row['chance']:.1%}" if row["chance"] >= 0.001 else f"{row['chance']:.0e}",
                f"{row['digit']:.1%}" if row.get("task", "passkey") == "passkey" else "",
                *(_percent(row.get(name)) for name in ("hallucinated_context", "hallucinated_invented", "abstained")),
            ]
            for row in rows
        ],
    )


def _percent(share: float | None) -> str:
    return "not reported" if share is None else f"{share:.1%}"


def _side_by_side(both: dict[str, Any]) -> list[str]:
    gist, full = both["gist"], both["full"]
    names = {
        "time_to_first_token_s": "time to first token, compression included (s)",
        "decode_tokens_per_s": "decode (tokens/s)",
        "prefill_peak_bytes": "peak memory of prefill (bytes)",
        "decode_peak_bytes": "peak memory of decode (bytes)",
    }
    compared = [(name, gist[key], full[key], key.endswith("bytes")) for key, name in names.items()]
    for k in (1, both["questions"]) if "questions" in both else ():
        compared.append(
            (f"{k} question(s) on one context, in all (s)", *(s["total_s"][k - 1] for s in (gist, full)), False)
        )
    skipped = []
    for row in both.get("decode_by_batch", []):
        if "not_measured" in row:
            skipped.append(f"Decoding a batch of {row['batch']} was not measured: {row['not_measured']}.")
        else:
            compared.append((f"decode, batch of {row['batch']} (tokens/s)", row["gist"], row["full"], False))
    lines = [
        f"Same weights, same context of {both['tokens']:,} tokens, side by side "
        f"(medians of {both['runs']} alternating runs, {both['threads']} thread(s)):",
        "",
        *table(("", "gist rows", "full cache", "gist / full"), [_compared(*row) for row in compared]),
    ]
    if "paying_questions" in both:
        lines += ["", _paying(*both["paying_questions"])]
    for line in skipped:
        lines += ["", line]
    return lines


def _paying(first: int | None, last: int | None) -> str:
    if first is None:
        return "In time alone, compressing never pays."
    until = "or more" if last is None else f"to {last:,}"
    return f"In time alone, compressing pays with {first:,} {until} questions on one context."


def _compared(name: str, gist: float | None, full: float | None, is_bytes: bool) -> list[str]:
    if gist is None or full is None:
        return [name, "not measured", "not measured", ""]
    shape = "{:,.0f}" if is_bytes else "{:,.3f}"
    return [name, shape.format(gist), shape.format(full), f"{gist / full:.3f}" if full else ""]


def read_report(path: Path) -> dict[str, Any]:
    """A report.json; ValueError if the file is none."""
    try:
        report = read_json(path, "rows")
        for row in report["rows"]:
            for name in ("language", "tokens", "gist_tokens", "ratio", "n", "exact", "wilson_low", "wilson_high"):
                row[name]
        comparison({path.stem: report})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report of train_niah.py or eval_niah.py: {error!r}") from error
    return report


def comparison(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """One table: the proof of concept's rows as it reported them, and the rows of each report."""
    rows = [_compared_row(NAME, row["model"], row) for row in ROWS]
    for name, report in reports.items():
        rows += [_compared_row(name, _model(report), row) for row in report["rows"]]
        rows += [
            _compared_row(f"{name}, full context", _model(report), row) for row in report.get("full_context") or []
        ]
    header = (
        "run",
        "model",
        "questions",
        "context tokens",
        "cached rows",
        "compression",
        "exact match",
        "95 % interval",
        "n",
        "hallucinated",
        "abstained",
        f"above {TARGET:.0%}",
    )
    lines = [
        *table(header, rows),
        "",
        "The proof of concept's rows are what it reported, not measured again. Metrics: docs/metrics.md.",
        "",
    ]
    for name, report in reports.items():
        lines.append(f"- {name}: {_provenance(report)}")
    return "\n".join(lines) + "\n"


def _compared_row(name: str, model: str, row: Mapping[str, Any]) -> list[str]:
    known = "wilson_low" in row
    return [
        name,
        model,
        label(row),
        f"{row['tokens']:,}",
        f"{row['gist_tokens']:,}",
        f"{row['ratio']:.0f}x",
        f"{row['exact']:.1%}",
        f"{row['wilson_low']:.1%} to {row['wilson_high']:.1%}" if known else "not reported",
        str(row["n"]) if known else "not reported",
        _percent(row.get("hallucinated")),
        _percent(row.get("abstained")),
        # the target is one for passkeys
        ("yes" if row["exact"] > TARGET else "no") if row.get("task", "passkey") == "passkey" else "",
    ]


def _model(report: Mapping[str, Any]) -> str:
    model = report.get("model")
    return f"{model['type']}, {model['parameters']:,} parameters, {model['dtype']}" if model else report["preset"]


def _provenance(report: Mapping[str, Any]) -> str:
    parts = [f"preset {report['preset']}", report["checkpoint"]]
    parts += [
        f"{what} {report[key]}"
        for key, what in (("seed", "seed"), ("evaluation_seed", "evaluation seed"))
        if key in report
    ]
    if found := report.get("environment"):
        parts.append(environment_line(found))
    return ", ".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json")
    parser.add_argument(
        "--out", type=output_file, required=True, help="path of the table and the plots, without an ending"
    )
    given = parser.parse_args(arguments)
    with errors_as_one_line(parser):
        _write(given.reports, given.out)


def _write(paths: Sequence[Path], out: Path) -> None:
    reports = dict(zip(_names(paths), map(read_report, paths), strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: report["rows"] for name, report in reports.items()}
    text = comparison(reports)
    pictures = {
        "exact match against compression ratio": (f"{out.name}-ratio.png", accuracy_against_ratio),
        "bytes of keys and values": (f"{out.name}-kv.png", kv_bytes),
    }
    for title, (file, draw) in pictures.items():
        draw(rows, out.parent / file)
        text += f"\n![{title}]({file})\n"
    if depth_map(rows, out.parent / f"{out.name}-depth.png"):
        text += f"\n![exact match by depth and length]({out.name}-depth.png)\n"
    (out.parent / f"{out.name}.md").write_text(text, encoding="utf-8")
    print(text)


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each report: its file's, or its folder's where the file is just report.json."""
    names = [path.resolve().parent.name if path.stem == "report" else path.stem for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"reports need different names, these would be {', '.join(names)}: rename a file or folder")
    return names


if __name__ == "__main__":
    main()
