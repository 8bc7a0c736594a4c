"""A run's report: JSON for programs, Markdown and a heat map for people."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["markdown", "write_report"]


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json, report.md and heatmap.png, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    report["environment"] = {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("gistkern", "torch", "transformers")},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    (folder / "report.md").write_text(markdown(report))
    _heat_map(report, folder / "heatmap.png")
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report's tables."""
    lines = [
        f"# {report['preset']}: {report['checkpoint']}",
        "",
        f"{report['decoding']}. Chance: {report['rows'][0]['chance']:.0e}.",
        "",
        "| language | tokens | cached rows | ratio | KV bytes, full | gist | n | exact | 95 % interval | digits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['language']} | {row['tokens']:,} | {row['gist_tokens']} | {row['ratio']:.0f}x "
            f"| {row['full_kv_bytes']:,} | {row['gist_kv_bytes']:,} | {row['n']} | {row['exact']:.1%} "
            f"| {row['wilson_low']:.1%} to {row['wilson_high']:.1%} | {row['digit']:.1%} |"
        )
    swap = report["swap"]
    lines += [
        "",
        f"Swap test (n={swap['n']}): with another sample's cache the answer is that sample's key in "
        f"{swap['answers_of_the_swapped_cache']:.0%} and the own context's key in "
        f"{swap['answers_of_the_own_context']:.0%}.",
        "",
    ]
    for row in report.get("context_visible", []):
        lines += [f"With the context still in sight ({row['language']}, n={row['n']}): exact {row['exact']:.1%}.", ""]
    return "\n".join(lines + _side_by_side(report["side_by_side"])) + "\n"


def _side_by_side(both: dict[str, Any]) -> list[str]:
    gist, full = both["gist"], both["full"]
    names = {
        "time_to_first_token_s": "time to first token, compression included (s)",
        "decode_tokens_per_s": "decode (tokens/s)",
        "prefill_peak_bytes": "peak memory of prefill (bytes)",
        "decode_peak_bytes": "peak memory of decode (bytes)",
    }
    lines = [
        f"Same weights, same context of {both['tokens']:,} tokens, side by side "
        f"(medians of {both['runs']} alternating runs, {both['threads']} thread(s)):",
        "",
        "| | gist rows | full cache | gist / full |",
        "|---|---|---|---|",
    ]
    for key, name in names.items():
        a, b = gist[key], full[key]
        if a is None or b is None:
            lines.append(f"| {name} | not measured | not measured | |")
            continue
        ratio = f"{a / b:.3f}" if b else ""
        shape = "{:,.0f}" if key.endswith("bytes") else "{:,.3f}"
        lines.append(f"| {name} | {shape.format(a)} | {shape.format(b)} | {ratio} |")
    return lines


def _heat_map(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(report["rows"], key=lambda row: (row["language"], row["tokens"]))
    cells = [[torch.nan if cell["exact"] is None else cell["exact"] for cell in row["by_depth"]] for row in rows]
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.45 * len(rows)), layout="constrained")
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(rows)), [f"{row['language']} {row['tokens']:,} ({row['ratio']:.0f}x)" for row in rows])
    axes.set_xticks(range(10), [f"{cell['depth']:.0%}" for cell in rows[0]["by_depth"]])
    axes.set(xlabel="depth of the needle", ylabel="context tokens", title="exact match from the gist rows alone")
    figure.colorbar(image, label="exact match")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
