"""The sections of docs/roofline.md about a full card: documents that fit, limits of decoding."""

from __future__ import annotations

from typing import Any

from bench.calculated import serving
from bench.markdown import per_card, significant, table
from gistkern.kernels.chips import Gpu, gpu_named

__all__ = ["fitting", "sections"]

# the formats whose documents are counted line by line
WRITTEN_OUT = ("bf16", "NF4, rest bf16")

_DOCUMENTS = """## How many documents fit

Caches beside the weights, {reserve:,} bytes kept for driver, allocator and fragments (as in [memory.md](memory.md)).
Uncompressed, a document takes a row per token. In segments every segment of 512 tokens leaves 8 rows; a last,
shorter segment too. Ten rows are ten rows whatever the document's length."""

_THROUGHPUT = """## Limits of decoding

Tokens per second of the whole batch, at most: batch / max((weights read + batch x rows x {row:,}) / bandwidth,
batch x (2 x {multiplied:,} + 4 x {head_dim} x {heads} x {layers} x rows) / peak). For example, {gpu}, bf16 weights,
batch 64:

```
{example}
```

Rows per sequence: {few} (gist rows and tail), {many:,} (6,096 tokens and tail), {most:,} (131,072 and tail). An empty
cell: the caches do not fit beside the weights. *Largest*: the largest batch that fits, and its limit. Every sequence
has a document of its own. Where a larger batch no longer raises the limit, the tensor cores set it."""


def sections(found: dict[str, Any]) -> list[str]:
    """Documents that fit, and tokens per second."""
    names = [gpu["name"] for gpu in found["gpus"]]
    return [*_documents(found, names), *_throughput(found, names)]


def fitting(found: dict[str, Any], name: str, kind: str) -> dict[str, int]:
    """Documents that fit on a card, by the name of the document."""
    mine = [each for each in found["documents"] if (each["gpu"], each["weights"]) == (name, kind)]
    return {each["document"]: each["fit"] for each in mine}


def _documents(found: dict[str, Any], names: list[str]) -> list[str]:
    head = ["card", "weights", *(document.name for document in serving.DOCUMENTS)]
    cells = [
        [name, kind, *(f"{fit:,}" for fit in fitting(found, name, kind).values())]
        for name in names
        for kind in serving.WEIGHTS
    ]

    def written_out(name: str) -> str:
        blocks = [_arithmetic(gpu_named(name), kind, found) for kind in WRITTEN_OUT]
        return "\n\n".join(f"```\n{block}\n```" for block in blocks)

    return [
        _DOCUMENTS.format(reserve=found["model"]["reserve"]),
        table(head, cells, text_columns=2),
        *per_card(names, "###", written_out, suffix=", line by line"),
    ]


def _arithmetic(gpu: Gpu, kind: str, found: dict[str, Any]) -> str:
    row, resident = found["model"]["kv_row"], found["weights"][kind]["resident"]
    left = serving.left_for_caches(gpu, kind)
    lines = [
        f"{gpu.name}, weights {kind}",
        f"  memory                {gpu.memory:>15,}",
        f"  kept free           - {found['model']['reserve']:>15,}",
        f"  weights             - {resident:>15,}",
        f"  left for caches     = {left:>15,}",
    ]
    for document in serving.DOCUMENTS:
        each = document.rows * row
        lines += [
            f"  {document.name}: {document.count}{document.rows:,} rows",
            f"      {document.rows:,} x {row:,} = {each:,} bytes",
            f"      {left:,} / {each:,} = {left / each:,.2f}: {left // each:,} fit",
        ]
    return "\n".join(lines)


def _throughput(found: dict[str, Any], names: list[str]) -> list[str]:
    model, (few, many, most), first = serving.LLAMA_3_8B, serving.rows_seen(), names[0]
    text = _THROUGHPUT.format(
        row=found["model"]["kv_row"],
        multiplied=found["model"]["multiplied"],
        head_dim=model.head_dim,
        heads=model.num_attention_heads,
        layers=model.num_hidden_layers,
        gpu=first,
        example="\n".join(_step(gpu_named(first), 64, rows, found) for rows in (few, many)),
        few=few,
        many=many,
        most=most,
    )
    head = ["weights", "rows", *(f"batch {batch:,}" for batch in serving.BATCHES), "largest", "its limit"]

    def of_card(name: str) -> str:
        mine = [each for each in found["throughput"] if each["gpu"] == name]
        return table(head, [[each["weights"], f"{each['rows']:,}", *_limits(each)] for each in mine])

    return [text, *per_card(names, "###", of_card, suffix=", tokens per second at most")]


def _limits(each: dict[str, Any]) -> list[str]:
    rates = [each["tokens_per_second"].get(str(batch)) for batch in serving.BATCHES]
    texts = ["" if rate is None else significant(rate) for rate in rates]
    if not each["largest_batch"]:
        return [*texts, "none", ""]
    return [*texts, f"{each['largest_batch']:,}", significant(each["largest_tokens_per_second"])]


def _step(gpu: Gpu, batch: int, rows: int, found: dict[str, Any]) -> str:
    row, read, multiplied = found["model"]["kv_row"], found["weights"]["bf16"]["read"], found["model"]["multiplied"]
    moved = read + batch * rows * row
    attention = serving.attention_flops(rows)
    flops = batch * (2 * multiplied + attention)
    memory, compute = moved / gpu.bandwidth, flops / gpu.flops
    rate = serving.tokens_per_second(gpu, "bf16", batch, rows)
    return "\n".join(
        [
            f"{rows:,} rows",
            f"  bytes       {read:,} + {batch} x {rows:,} x {row:,} = {moved:,}",
            f"  memory      {moved:,} / {gpu.bandwidth:,} = {significant(memory * 1e3, 4)} ms",
            f"  FLOPs       {batch} x (2 x {multiplied:,} + {attention:,}) = {flops:,}",
            f"  arithmetic  {flops:,} / {gpu.flops:,} = {significant(compute * 1e3, 4)} ms",
            f"  at most     {batch} / {significant(max(memory, compute) * 1e3, 4)} ms = {rate:,.0f} tokens per second",
        ]
    )
