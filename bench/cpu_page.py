"""docs/evidence/cpu.md from the report of `make cpu-report`."""

from __future__ import annotations

from typing import Any

from bench.markdown import left_aligned

__all__ = ["BOTH_TARGET", "FORWARD_TARGET", "page"]

FORWARD_TARGET, BOTH_TARGET = 0.75, 0.65

_INTRO = """# The CPU kernels, measured

Grade **measured**: `{command}` on {machine} ({instruction_set} kernels), {threads}, {versions}. Medians of
{rounds} rounds, smallest and largest in brackets. Within a round every call follows the other, in one process, and each
number is a ratio of two of them. Results are compared with each other before anything is timed.

*Of peak*: 4 D operations per visible pair and head (3.5 times that with the backward), as a share of what torch's
sgemm of 1024 x 1024 matrices does in the same round. *SDPA* is the backend that serves without the extension."""

_TRAINING = """## Forward and backward

Aims for 512/8: {forward} of peak forward, {both} with backward."""

_GROWTH = """## Cost at a fixed segment length

512/8, two heads of D 64, forward: time per row as a multiple of that at 4,096 rows, beside the growth of visible pairs
per row (later segments see the gists of all earlier ones)."""

_DECODING = """## Decoding

One query row, Llama-3-8B's heads, fp32. *Of copy bandwidth*: bytes of keys and values per second, as a share of the
bytes that a copy of 256 MiB reads and writes; small caches are read from the processor's caches, hence shares
above 1."""


def page(report: dict[str, Any]) -> str:
    """The page of a report."""
    threads = "one thread" if report["threads"] == 1 else f"{report['threads']} threads"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    parts = [_INTRO.format(**report | {"threads": threads, "versions": versions})]
    parts.append(_TRAINING.format(forward=FORWARD_TARGET, both=BOTH_TARGET))
    head = [
        "layout",
        "rows",
        "heads",
        "forward of peak",
        "SDPA",
        "both of peak",
        "SDPA",
        "SDPA / ours, forward",
        "both",
    ]
    keys = ["forward of peak", "sdpa forward of peak", "both of peak", "sdpa both of peak"]
    keys += ["forward, sdpa / ours", "both, sdpa / ours"]
    rows = [[r["layout"], r["rows"], r["heads"], *(_spread(r[key]) for key in keys)] for r in report["training"]]
    parts.append(left_aligned(head, rows))
    if report["growth"]:
        rows = [[r["rows"], _spread(r["time per row"]), f"{r['visible pairs per row']:.2f}"] for r in report["growth"]]
        parts += [_GROWTH, left_aligned(["rows", "time per row", "visible pairs per row"], rows)]
    if report["decoding"]:
        sizes = ["gist rows", "tail rows", "batch"]
        rows = [
            [*(r[s] for s in sizes), _spread(r["of copy bandwidth"]), _spread(r["sdpa / ours"])]
            for r in report["decoding"]
        ]
        parts += [_DECODING, left_aligned([*sizes, "of copy bandwidth", "SDPA / ours"], rows)]
    return "\n\n".join(parts) + "\n"


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"
