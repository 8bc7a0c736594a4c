"""What a perfect kernel would take: FLOPs and bytes from the work counter, published peaks. No measurement.

    make roofline                        # fills docs/internals/roofline.md
    make roofline ARGS="--rows rows.json"     # every card, layout and length

The attention op is counted here, the model around it (weights, caches, decoding) in bench/calculated/serving.py.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.calculated import serving
from bench.counted.work import Shape, backward_work, forward_work, least_bytes, visible_pairs
from bench.fill import DOCS, fill
from bench.markdown import columns, significant, table
from bench.rows import write_report
from bench.shapes import HEADS, layout_of
from gistkern import GistLayout
from gistkern.kernels.chips import GPUS, Gpu

COUNTED = ("one segment", "64/4", "256/16", "512/8", "1024/128", "hierarchical")
ROWS = (4096, 16384, 32768, 131072)
SHAPE = Shape(*HEADS["Llama-3-8B"])


def perfect_time(gpu: Gpu, flops: int, moved: int) -> tuple[float, str]:
    """The longer of arithmetic at peak and memory traffic at full bandwidth, which overlap completely; and which."""
    return max((moved / gpu.bandwidth, "memory"), (flops / gpu.flops, "compute"))


def flops_of(pairs: int, shape: Shape, backward: bool = False) -> int:
    """FLOPs on visible pairs: two products of the forward, five of the backward, 2 D each per pair and head."""
    return (5 if backward else 2) * 2 * shape.head_dim * pairs * shape.heads


def op(name: str, rows: int, shape: Shape = SHAPE) -> dict[str, Any]:
    """FLOPs and bytes of one layout, and per card the FLOPs of the schedule's tiles and the times."""
    layout = layout_of(name, rows)
    causal = GistLayout.from_segments([], 1, tail=rows, sink_tokens=0)
    found: dict[str, Any] = {"segments": name, "rows": rows, "visible_pairs": visible_pairs(layout)}
    found["share_of_causal"] = found["visible_pairs"] / visible_pairs(causal)
    for key, backward in (("forward", False), ("backward", True)):
        flops = flops_of(found["visible_pairs"], shape, backward)
        moved = least_bytes(layout, shape, backward)
        plain = flops_of(visible_pairs(causal), shape, backward), sum(least_bytes(causal, shape, backward).values())
        found[key] = {"flops": flops, "tensors": moved, "bytes": sum(moved.values()), "gpus": {}}
        for gpu in GPUS:
            tiles = _tile_flops(layout, shape, gpu, backward)
            (time, bound), (own, _) = (perfect_time(gpu, count, found[key]["bytes"]) for count in (flops, tiles))
            found[key]["gpus"][gpu.name] = {"seconds": time, "bound": bound, "tile_flops": tiles, "tile_seconds": own}
            found[key]["gpus"][gpu.name]["causal_seconds"] = perfect_time(gpu, *plain)[0]
    return found


def _tile_flops(layout: GistLayout, shape: Shape, gpu: Gpu, backward: bool) -> int:
    if not backward:
        return forward_work(layout, shape, gpu.chip).flops
    return sum(work.flops for work in backward_work(layout, shape, gpu.chip).values())


def report() -> dict[str, Any]:
    """Every layout and length."""
    return {
        "grade": "calculated, not measured",
        "command": "make roofline",
        "shape": SHAPE._asdict(),
        "op": [op(name, rows) for rows in ROWS for name in COUNTED],
    }


SHOWN_ROWS = (16384, 131072)
BATCHES = (1, 16, 64)


def tables(found: dict[str, Any]) -> dict[str, str]:
    """By name, of a report of roofline.py."""
    first = GPUS[0].name
    op = [row for row in found["op"] if row["rows"] in SHOWN_ROWS]
    return {
        "cards": columns(
            map(asdict, GPUS),
            {
                "card": "name",
                "bf16 TFLOP/s": lambda gpu: f"{gpu['flops'] / 1e12:g}",
                "GB/s": lambda gpu: f"{gpu['bandwidth'] / 1e9:,.0f}",
                "FLOPs per byte": lambda gpu: f"{gpu['flops'] / gpu['bandwidth']:.0f}",
                "GB": lambda gpu: f"{gpu['memory'] / 1e9:g}",
                "source": "source",
            },
        ),
        "op": columns(
            op,
            {
                "segments": "segments",
                "rows": "rows",
                "pairs of causal": lambda row: f"{row['share_of_causal']:.1%}",
                "forward ms": lambda row: _ms(row["forward"]["gpus"][first]["seconds"]),
                "bound": lambda row: row["forward"]["gpus"][first]["bound"],
                "tiles": lambda row: _ms(row["forward"]["gpus"][first]["tile_seconds"]),
                "causal": lambda row: f"{_gain(row['forward']['gpus'][first]):.1f}",
                "backward ms": lambda row: _ms(row["backward"]["gpus"][first]["seconds"]),
                "its tiles": lambda row: _ms(row["backward"]["gpus"][first]["tile_seconds"]),
            },
        ),
        "weights": table(
            ["weights", "bytes in memory", "read per step", "KV of memory", "KV of a step", "KV larger from"],
            [_weights(kind) for kind in serving.WEIGHTS],
        ),
        "documents": table(
            ["card", "weights", *serving.DOCUMENTS],
            [
                [gpu.name, kind, *(f"{serving.largest_batch(gpu, kind, n):,}" for n in serving.DOCUMENTS.values())]
                for gpu in GPUS
                for kind in serving.WEIGHTS[:2]
            ],
            2,
        ),
        "limits": table(
            ["card", "rows", *(f"batch {batch}" for batch in BATCHES), "largest", "its limit"],
            [[gpu.name, *_limits(gpu, rows)] for gpu in GPUS for rows in serving.rows_seen()[:2]],
        ),
    }


def _weights(kind: str) -> list[str]:
    held, rows = serving.weights_of(kind), serving.CONTEXTS[0]
    shares = serving.kv_share_of_memory(kind, rows), serving.kv_share(kind, 1, rows + serving.TAIL)
    from_ = held.read // serving.kv_row() + 1
    return [kind, f"{held.resident:,}", f"{held.read:,}", *(f"{share:.1%}" for share in shares), f"{from_:,}"]


def _limits(gpu: Any, rows: int) -> list[str]:
    most = serving.largest_batch(gpu, "bf16", rows)
    rates = [serving.tokens_per_second(gpu, "bf16", batch, rows) for batch in (*BATCHES, most)]
    fit = [significant(rate) if batch <= most else "-" for batch, rate in zip(BATCHES, rates, strict=False)]
    return [f"{rows:,}", *fit, f"{most:,}", significant(rates[-1])]


def _gain(time: dict[str, Any]) -> float:
    return time["causal_seconds"] / time["seconds"]


def _ms(seconds: float) -> str:
    return significant(seconds * 1e3)


def main(arguments: list[str] | None = None) -> None:
    """Calculate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, metavar="REPORT.json", help="write every row, and leave the page alone")
    given = parser.parse_args(arguments)
    found = report()
    if given.rows:
        write_report(given.rows, found)
    else:
        fill(DOCS / "internals" / "roofline.md", tables(found))


if __name__ == "__main__":
    main()
