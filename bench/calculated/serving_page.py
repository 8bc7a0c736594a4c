"""The sections of docs/roofline.md about a decoding step of the whole model: weights against KV."""

from __future__ import annotations

from typing import Any

from bench.calculated import capacity_page, serving
from bench.markdown import per_card, table
from gistkern.kernels.chips import gpu_named

__all__ = ["findings", "sections"]

_MODEL = """## Decoding: the model

A step reads every weight once for the whole batch, but of the input embedding only a row per sequence, and every
sequence's cached rows.

```
parameters                     {parameters:,}
input embedding                {vocabulary:,} x {hidden:,} = {embedding:,}
multiplied with                {parameters:,} - {embedding:,} = {multiplied:,}
one cached row, all layers     2 x {layers} x {kv_heads} x {head_dim} x 2 = {row:,} bytes
6,096 tokens                   6,096 x {row:,} = {context:,} bytes
{gists} gist rows                   {gists} x {row:,} = {gist_bytes:,} bytes
```

Weights. NF4 has double quantisation, as `gistkern.training.memory` counts it ([memory.md](memory.md)): half a byte per
weight of the layers' linears, a byte per 64 and 4 bytes per 16,384 of them for scales. The vocabulary matrices and
norms are not quantised: bf16 in a model that is only loaded in 4 bits, fp32 after `prepare_model_for_kbit_training`."""

_TWELVE = """### "About 12 % of memory at batch 1 and 6K tokens"

KV over KV and weights, in memory:

{lines}

So the statement is true of a model loaded in 4 bits with the rest in bf16 ({nf4:.1%}). With bf16 weights it is
{bf16:.1%}; with the vocabulary in fp32, as training leaves it, {fp32:.1%} (but {fp32_read:.1%} of the bytes that a step
reads, next table). Of the whole of a 24 GB card 6,096 tokens are {context:,} / 24,000,000,000 = {card:.1%}, whatever
the weights. Ten gist rows are {gist:.3%} of KV and bf16 weights."""

_SHARES = """### Share of KV in the bytes that a step reads

For rows per sequence: {few} (gist rows and tail), {many:,} (6,096 tokens and tail), {most:,} (131,072 and tail)."""

_CROSSOVER = """### Where KV is the larger part

By bytes, on every card: batch x rows above (bytes of weights read) / {row:,}.

{lines}

By time it depends on the card, since the weights are not only read but multiplied with: their part of a step is
max(bytes read / bandwidth, 2 x {multiplied:,} x batch / peak), and the second grows with the batch. KV's part is its
memory traffic (4 FLOPs per byte). In each cell: the rows per sequence from which KV takes longer than the weights / the
rows per sequence that fit on the card. **Bold**: the first fit, so KV can be the larger part. Below the first number
of the last column the weights take longer at any batch; {few} rows lie below it on every card."""


def findings(found: dict[str, Any]) -> list[str]:
    """What the page says about the model, in one item each."""
    lines = [
        "The op of decoding is bound by memory at any batch and length. Over ten gist rows and "
        f"{serving.TAIL} raw rows it moves 1/{_op_ratio(found):.0f} of the bytes that it moves over 6,096 tokens and "
        "the same raw rows.",
        f"At batch 1 and 6,096 tokens KV is {_of_memory(found, 'bf16'):.1%} of weights and KV in bf16, "
        f"{_of_memory(found, 'NF4, rest bf16'):.1%} with NF4 weights (rest bf16), "
        f"{_of_memory(found, 'NF4, rest fp32'):.1%} with NF4 and the rest in fp32: to save memory, one such context "
        "need not be compressed.",
        f"KV is the larger part of the bytes of a step from batch x rows = {_from_bytes('bf16'):,} on with bf16 "
        f"weights, {_from_bytes('NF4, rest bf16'):,} with NF4 (rest bf16).",
    ]
    for name in ("H100 SXM 80 GB", "RTX 4090 24 GB"):
        counts = capacity_page.fitting(found, name, "bf16")
        lines.append(
            f"{name}, bf16 weights: {counts['6,096 tokens, uncompressed']:,} documents of 6,096 tokens fit "
            f"uncompressed, {counts['10 gist rows']:,} in 10 rows each, {counts['128 gist rows']:,} in 128, "
            f"{counts['6,096 tokens in segments of 512/8']:,} in segments of 512/8; of 131,072 tokens "
            f"{counts['131,072 tokens, uncompressed']:,} uncompressed and "
            f"{counts['131,072 tokens in segments of 512/8']:,} in segments of 512/8."
        )
    name = "H100 SXM 80 GB"
    few, many, _ = serving.rows_seen()
    mine = {
        each["rows"]: each
        for each in found["throughput"]
        if (each["gpu"], each["weights"]) == (name, serving.WEIGHTS[0])
    }
    one = [mine[rows]["tokens_per_second"]["1"] for rows in (few, many)]
    most = [mine[rows]["largest_tokens_per_second"] for rows in (few, many)]
    lines.append(
        f"Decoding gains little at batch 1 ({name}, bf16 weights, 6,096 tokens: at most {one[0]:.0f} tokens per second "
        f"with gist rows, {one[1]:.0f} with the full context, {one[0] / one[1]:.2f}x) and much by the batch that fits: "
        f"at most {most[0]:,.0f}, where the tensor cores are the limit, against {most[1]:,.0f}."
    )
    return lines


def sections(found: dict[str, Any]) -> list[str]:
    """Weights, shares of KV, and where it is the larger part."""
    return [*_model(found), _twelve(found), *_shares(found), *_crossover(found)]


def _model(found: dict[str, Any]) -> list[str]:
    model, numbers = serving.LLAMA_3_8B, found["model"]
    text = _MODEL.format(
        parameters=numbers["parameters"],
        vocabulary=model.vocab_size,
        hidden=model.hidden_size,
        embedding=model.vocab_size * model.hidden_size,
        multiplied=numbers["multiplied"],
        layers=model.num_hidden_layers,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        row=numbers["kv_row"],
        context=serving.CONTEXTS[0] * numbers["kv_row"],
        gists=serving.GIST_ROWS,
        gist_bytes=serving.GIST_ROWS * numbers["kv_row"],
    )
    cells = [
        [kind, f"{each['resident']:,}", f"{each['resident'] - each['read']:,}", f"{each['read']:,}"]
        for kind, each in found["weights"].items()
    ]
    return [text, table(["weights", "bytes in memory", "input embedding", "read per step"], cells)]


def _twelve(found: dict[str, Any]) -> str:
    row = found["model"]["kv_row"]
    cells = []
    for each in found["share_of_memory"]:
        cache, resident = each["tokens"] * row, found["weights"][each["weights"]]["resident"]
        fraction = f"{cache:,} / ({resident:,} + {cache:,})"
        cells.append([each["weights"], f"{each['tokens']:,}", fraction, f"{each['share']:.1%}"])
    context, ten = serving.CONTEXTS[0] * row, serving.GIST_ROWS * row
    return _TWELVE.format(
        lines=table(["weights", "tokens", "KV / (weights + KV)", "share"], cells),
        nf4=_of_memory(found, "NF4, rest bf16"),
        bf16=_of_memory(found, "bf16"),
        fp32=_of_memory(found, "NF4, rest fp32"),
        fp32_read=_share(found, "NF4, rest fp32", 1, serving.rows_seen()[1]),
        context=context,
        card=context / gpu_named("RTX 4090 24 GB").memory,
        gist=ten / (ten + found["weights"]["bf16"]["resident"]),
    )


def _shares(found: dict[str, Any]) -> list[str]:
    seen = serving.rows_seen()
    head = ["batch", *(f"{kind}: {rows:,}" for kind in serving.WEIGHTS for rows in seen)]
    cells = [
        [batch, *(f"{_share(found, kind, batch, rows):.1%}" for kind in serving.WEIGHTS for rows in seen)]
        for batch in serving.BATCHES
    ]
    return [_SHARES.format(few=seen[0], many=seen[1], most=seen[2]), table(head, cells)]


def _crossover(found: dict[str, Any]) -> list[str]:
    row = found["model"]["kv_row"]
    lines = "\n".join(
        f"- {kind}: {each['read']:,} / {row:,} = {each['read'] / row:,.2f}, so from {each['read'] // row + 1:,} on"
        for kind, each in found["weights"].items()
    )
    few, multiplied = serving.rows_seen()[0], found["model"]["multiplied"]
    head = ["weights", *(f"batch {batch:,}" for batch in serving.BATCHES)]

    def cells(name: str, kind: str) -> list[str]:
        mine = [each for each in found["crossover"] if (each["gpu"], each["weights"]) == (name, kind)]
        texts = [(f"{each['rows']:,} / {each['fits']:,}", each["fits"] >= each["rows"]) for each in mine]
        return [f"**{text}**" if reached else text for text, reached in texts]

    def of_card(name: str) -> str:
        return table(head, [[kind, *cells(name, kind)] for kind in serving.WEIGHTS])

    names = [gpu["name"] for gpu in found["gpus"]]
    return [
        _CROSSOVER.format(row=row, lines=lines, multiplied=multiplied, few=few),
        *per_card(names, "####", of_card),
    ]


def _op_ratio(found: dict[str, Any]) -> float:
    few, full = (
        next(row["bytes"] for row in found["decoding"] if row["gist_rows"] + row["raw_rows"] == rows)
        for rows in serving.rows_seen()[:2]
    )
    return full / few


def _of_memory(found: dict[str, Any], kind: str) -> float:
    return next(each["share"] for each in found["share_of_memory"] if each["weights"] == kind)


def _share(found: dict[str, Any], kind: str, batch: int, rows: int) -> float:
    wanted = (kind, batch, rows)
    return next(each["share"] for each in found["shares"] if (each["weights"], each["batch"], each["rows"]) == wanted)


def _from_bytes(kind: str) -> int:
    return serving.weights_of(kind).read // serving.kv_row() + 1
