"""What a perfect kernel would take: FLOPs and bytes from the work counter, published peaks. No measurement.

    make roofline                        # fills docs/internals/roofline.md

The attention op is counted here, the model around it (weights, caches, decoding) in bench/calculated/serving.py.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench.calculated import serving
from bench.counted.work import Shape, backward_work, forward_work, least_bytes, visible_pairs
from bench.fill import DOCS, fill
from bench.markdown import columns, significant, table
from bench.shapes import HEADS, layout_of
from gistkern import GistLayout
from gistkern.kernels.chips import GPUS, Gpu

COUNTED = ("one segment", "64/4", "256/16", "512/8", "1024/128", "hierarchical")
SHAPE = Shape(*HEADS["Llama-3-8B"])


def perfect_time(gpu: Gpu, flops: int, moved: int) -> tuple[float, str]:
    """The longer of arithmetic at peak and memory traffic at full bandwidth, which overlap completely; and which."""
    return max((moved / gpu.bandwidth, "memory"), (flops / gpu.flops, "compute"))


def flops_of(pairs: int, shape: Shape, backward: bool = False) -> int:
    """FLOPs on visible pairs: two products of the forward, five of the backward, 2 D each per pair and head."""
    return (5 if backward else 2) * 2 * shape.head_dim * pairs * shape.heads


def op(name: str, rows: int, gpu: Gpu = GPUS[0]) -> dict[str, Any]:
    """FLOPs and bytes of one layout, the FLOPs of the schedule's tiles, and the times on a card."""
    layout, causal = layout_of(name, rows), GistLayout.from_segments([], 1, tail=rows, sink_tokens=0)
    pairs, all_pairs = visible_pairs(layout), visible_pairs(causal)
    found: dict[str, Any] = {
        "segments": name,
        "rows": rows,
        "visible_pairs": pairs,
        "share_of_causal": pairs / all_pairs,
    }
    for key, backward in (("forward", False), ("backward", True)):
        size, plain = (sum(least_bytes(one, SHAPE, backward).values()) for one in (layout, causal))
        works = backward_work(layout, SHAPE, gpu.chip) if backward else {"": forward_work(layout, SHAPE, gpu.chip)}
        flops, tiles = flops_of(pairs, SHAPE, backward), sum(work.flops for work in works.values())
        seconds, bound = perfect_time(gpu, flops, size)
        found[key] = {"flops": flops, "bytes": size, "seconds": seconds, "bound": bound, "tile_flops": tiles}
        found[key]["tile_seconds"] = perfect_time(gpu, tiles, size)[0]
        found[key]["causal_seconds"] = perfect_time(gpu, flops_of(all_pairs, SHAPE, backward), plain)[0]
    return found


ROWS = (16384, 131072)
BATCHES = (1, 16, 64)


def tables() -> dict[str, str]:
    """Those of docs/internals/roofline.md."""

    def shown(key: str, what: str) -> Callable[[Any], str]:
        return lambda row: significant(1e3 * row[key][what])

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
            [op(name, rows) for rows in ROWS for name in COUNTED],
            {
                "segments": "segments",
                "rows": "rows",
                "pairs of causal": lambda row: f"{row['share_of_causal']:.1%}",
                "forward ms": shown("forward", "seconds"),
                "bound": lambda row: row["forward"]["bound"],
                "tiles": shown("forward", "tile_seconds"),
                "causal": lambda row: f"{row['forward']['causal_seconds'] / row['forward']['seconds']:.1f}",
                "backward ms": shown("backward", "seconds"),
                "its tiles": shown("backward", "tile_seconds"),
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


if __name__ == "__main__":
    fill(DOCS / "internals" / "roofline.md", tables())
