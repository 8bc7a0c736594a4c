"""The tables of docs/roofline.md: cards and the op (roofline.py), the model around it (serving.py)."""

from dataclasses import asdict
from typing import Any

from bench.calculated import serving
from bench.markdown import columns, significant, table
from gistkern.kernels.chips import GPUS

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
        "decoding": columns(
            found["decoding"],
            {"gist rows": "gist_rows", "raw rows": "raw_rows", "bytes": "bytes"}
            | {gpu.name: _microseconds(gpu.name) for gpu in GPUS},
            0,
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


def _microseconds(gpu: str) -> Any:
    return lambda row: significant(row["gpus"][gpu]["seconds"] * 1e6)


def _gain(time: dict[str, Any]) -> float:
    return time["causal_seconds"] / time["seconds"]


def _ms(seconds: float) -> str:
    return significant(seconds * 1e3)
