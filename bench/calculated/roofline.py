"""What a perfect kernel would take: FLOPs and bytes from the work counter, published peaks. No measurement.

    make roofline                        # fills docs/roofline.md
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
from bench.rows import write_report
from bench.shapes import HEADS, layout_of
from gistkern import GistLayout
from gistkern.kernels.chips import GPUS, Gpu

COUNTED = ("one segment", "64/4", "256/16", "512/8", "1024/128", "hierarchical")
ROWS = (4096, 16384, 32768, 131072)
DECODED = (4096, 6096, 32768, 131072)
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


def decoding(batch: int, gist_rows: int, raw_rows: int, shape: Shape = SHAPE) -> dict[str, Any]:
    """One layer's attention of a decoding step; each sequence sees its gist rows and its raw rows, itself included."""
    layout = GistLayout.decode(gist_rows, raw_rows - 1)
    flops = batch * flops_of(visible_pairs(layout), shape)
    moved = batch * sum(least_bytes(layout, shape).values())
    times = {gpu.name: dict(zip(("seconds", "bound"), perfect_time(gpu, flops, moved), strict=True)) for gpu in GPUS}
    rows = {"batch": batch, "gist_rows": gist_rows, "raw_rows": raw_rows}
    return rows | {"flops": flops, "bytes": moved, "gpus": times}


def report() -> dict[str, Any]:
    """Every layout and length, and one layer's decoding step of one sequence."""
    contexts = [(serving.GIST_ROWS, serving.TAIL), *((0, tokens + serving.TAIL) for tokens in DECODED)]
    return {
        "grade": "calculated, not measured",
        "command": "make roofline",
        "shape": asdict(SHAPE),
        "op": [op(name, rows) for rows in ROWS for name in COUNTED],
        "decoding": [decoding(1, gists, raw) for gists, raw in contexts],
    }


def main(arguments: list[str] | None = None) -> None:
    """Calculate and write."""
    from bench.calculated.tables import tables

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, metavar="REPORT.json", help="write every row, and leave the page alone")
    given = parser.parse_args(arguments)
    found = report()
    if given.rows:
        write_report(given.rows, found)
    else:
        fill(DOCS / "roofline.md", tables(found))


if __name__ == "__main__":
    main()
