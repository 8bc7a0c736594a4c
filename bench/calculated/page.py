"""docs/roofline.md from the report of `make roofline`: cards and op here, the model in serving_page.py."""

from __future__ import annotations

from typing import Any

from bench.calculated import capacity_page, serving, serving_page
from bench.markdown import bullets, per_card, significant, table

__all__ = ["page"]

# the layout whose arithmetic is written out
EXAMPLE = ("512/8", 32768)

_INTRO = """# Roofline

**Calculated, not measured.** Written by `{command}` (bench/calculated/roofline.py) from published peak numbers, the
visible pairs of the layouts and the work counter (bench/counted/work.py); the numbers are in
[evidence/roofline.json](evidence/roofline.json). No kernel ran for this page.

A *perfect kernel* does the arithmetic at the card's peak and moves every tensor once at full bandwidth, both at the
same time: max(FLOPs / peak, bytes / bandwidth). So a time is a lower limit, a number of tokens per second an upper one.
Everything is for Llama-3-8B: heads {heads}/{kv_heads}, head dimension {head_dim}, {layers} layers, bf16 activations and
caches. (131,072 tokens need a model trained for them; Llama-3.1-8B has the same sizes.) GB are 10^9 bytes."""

_IGNORED = """## What it ignores

- **Launches, and all that is neither arithmetic nor memory traffic.** For one sequence of ten gist rows and a tail the
  op's time on this page is below a microsecond, less than the launch of a kernel takes: bytes are not what limits it.
- **The exponentials of softmax.** H100 computes 3.9 x 10^12 of them per second (Shah et al. 2024, FlashAttention-3),
  and needs one per 4 D = 512 FLOPs of the forward. That is enough for 2.0 x 10^15 FLOP/s, twice the tensor cores' peak,
  so they hide behind the products, but only in a kernel that overlaps the two.
- **The L2 cache.** What is still there need not come from memory. One layer's keys and values of 6,096 tokens are
  25 MB, less than the L2 of each card: the op alone, in a loop, can be faster than this page says. In a model the
  weights go through the same cache between two visits to a layer.
- **Clocks.** Peaks are at the published boost clock; most cards run slower under load, some a little faster.
- **The layout's vectors** (12 bytes per row), the gather of gist rows before the op, and fp32 partial sums of the
  backward.
- **In the model**: activations, norms, rotations, sampling, the compression of documents and the prefill of
  questions; what it costs to turn NF4 into bf16, and that fp32 products are slower; fragmentation beyond
  {reserve:,} bytes kept free; memory as a driver reports it, a few percent off the printed size; the attention sink,
  one row more (11 instead of 10).
- **Whether the rows are enough.** That a document fits into ten rows is a matter of training; the
  [README](../README.md) says what has been shown."""

_OP = """## The op: forward and backward

FLOPs of the visible pairs: forward 2 products, 4 D per pair and head; backward 5 products (scores, dP, dV, dK, dQ), 2.5
times as many. *FLOPs of the tiles*: what the shipped schedule really multiplies, whole tiles counted
([evidence/work.md](evidence/work.md)). Its backward runs dq and dk/dv as separate kernels and computes the scores and
dP in both: 7 products, hence at least 1.4 times as many. Bytes: forward reads q, k, v and the gist rows and writes out
and lse (fp32); backward reads all of these and dout, and writes the gradients of q, k, v and the gist rows. Batch 1,
one layer.

*One segment* is plain causal attention. A document in a single segment with ten gists costs the same: its rows see all
earlier rows of the segment; it saves in decoding.

The arithmetic of one row, {name} at {rows:,} tokens, forward, {gpu}:

```
{example}
```

### Counts

FLOPs and bytes are the same on every card."""

_TIMES = """### Times

Milliseconds of a perfect kernel, what bounds it, and the same for the FLOPs of our schedule's tiles (*tiles*: no run of
our kernels can be shorter). *Causal*: how many times as long a perfect plain causal kernel takes as the perfect
kernel for the layout."""

_DECODING = """## Decoding: the op

One layer, one new row per sequence. With gists a sequence sees {gists} gist rows and {tail} raw rows (question and
answer so far, the new row included); without, its whole context and the same {tail}. Per sequence the op moves q and
out, 2 x 32 x 128 x 2 = 16,384 bytes, lse, 32 x 4 = 128, and 2 x 8 x 128 x 2 = 4,096 bytes per row:

```
gist rows: 16,384 + 128 + {few:,} x 4,096 = {few_bytes:,} bytes
6,096 tokens: 16,384 + 128 + {many:,} x 4,096 = {many_bytes:,} bytes, {ratio:.0f} times as many
```

A row takes 4 x 128 x 32 = 16,384 FLOPs and 4,096 bytes: 4 FLOPs per byte, the number of query heads per key head. Every
card's ridge lies above 150, so memory bounds the op at any batch and length, and time is proportional to the batch.
Microseconds:"""


def page(found: dict[str, Any]) -> str:
    """The page of a report."""
    shape, gpus = found["shape"], [gpu["name"] for gpu in found["gpus"]]
    layers = serving.LLAMA_3_8B.num_hidden_layers
    name, rows = EXAMPLE
    example = next(row for row in found["op"] if (row["segments"], row["rows"]) == EXAMPLE)
    parts = [
        _INTRO.format(command=found["command"], layers=layers, **shape),
        _findings(found),
        "![limits of decoding, perfect forward times](pictures/roofline.png)",
        _IGNORED.format(reserve=found["model"]["reserve"]),
        _cards(found["gpus"]),
        _OP.format(name=name, rows=rows, gpu=gpus[0], example=_example(example, found)),
        _counts(found["op"]),
        _TIMES,
        *per_card(gpus, "####", lambda gpu: _times(gpu, found["op"])),
        *_decoding(found["decoding"], gpus),
        *serving_page.sections(found),
        *capacity_page.sections(found),
    ]
    return "\n\n".join(parts) + "\n"


def _findings(found: dict[str, Any]) -> str:
    first = found["gpus"][0]["name"]
    longest = max(row["rows"] for row in found["op"])
    gain = {row["segments"]: _factor(row["forward"]["gpus"][first]) for row in found["op"] if row["rows"] == longest}
    bounds = [
        f"{gpu['name']}: {_memory_bound(found['op'], gpu['name'])} of {len(found['op'])}" for gpu in found["gpus"]
    ]
    lines = [
        f"At {longest:,} tokens a perfect forward on {first} is {gain['512/8']:.1f} times as fast as plain causal for "
        f"512/8, {gain['256/16']:.1f} times for 256/16, {gain['1024/128']:.1f} times for 1024/128.",
        f"Forwards that memory bounds, of all layouts and lengths below: {'; '.join(bounds)}. The others are bound "
        "by the tensor cores, as plain causal attention is.",
        *serving_page.findings(found),
    ]
    return "## What it says\n\n" + bullets(lines)


def _factor(time: dict[str, Any]) -> float:
    return time["causal_seconds"] / time["seconds"]


def _memory_bound(rows: list[dict[str, Any]], gpu: str) -> int:
    return sum(row["forward"]["gpus"][gpu]["bound"] == "memory" for row in rows)


def _cards(gpus: list[dict[str, Any]]) -> str:
    head = ["card", "source", "bf16 TFLOP/s, dense", "GB/s", "FLOPs per byte at the ridge", "memory, GB"]
    rows = [
        [
            gpu["name"],
            gpu["source"],
            f"{gpu['flops'] / 1e12:g}",
            f"{gpu['bandwidth'] / 1e9:,.0f}",
            f"{gpu['flops'] / 1e12:g} / {gpu['bandwidth'] / 1e12:g} = {gpu['ridge']:.0f}",
            f"{gpu['memory'] / 1e9:g}",
        ]
        for gpu in gpus
    ]
    text = "Tensor cores, bf16 products with fp32 accumulation, without sparsity."
    return f"## The cards\n\n{text}\n\n" + table(head, rows, text_columns=2)


def _example(row: dict[str, Any], found: dict[str, Any]) -> str:
    gpu, shape, forward = found["gpus"][0], found["shape"], row["forward"]
    time, tensors, rows = forward["gpus"][gpu["name"]], forward["tensors"], row["rows"]
    heads, keys, dim, size = shape["heads"], shape["kv_heads"], shape["head_dim"], shape["itemsize"]
    compact = tensors["gist_k"] // (keys * dim * size)
    sums = [f"2 x {tensors[name]:,}" for name in ("q", "k", "gist_k")]
    causal = rows * (rows + 1) // 2
    pairs = row["visible_pairs"]
    lines = [
        ("visible pairs", f"{pairs:,} of {rows:,} x {rows + 1:,} / 2 = {causal:,}"),
        ("FLOPs", f"4 x {dim} x {pairs:,} x {heads} heads = {forward['flops']:,}"),
        ("FLOPs of the tiles", f"{time['tile_flops']:,}"),
        ("q, out, each", f"{rows:,} x {heads} x {dim} x {size} = {tensors['q']:,} bytes"),
        ("k, v, each", f"{rows:,} x {keys} x {dim} x {size} = {tensors['k']:,}"),
        ("gist rows, k and v each", f"{compact:,} x {keys} x {dim} x {size} = {tensors['gist_k']:,}"),
        ("lse", f"{rows:,} x {heads} x 4 = {tensors['lse']:,}"),
        ("bytes", f"{' + '.join(sums)} + {tensors['lse']:,} = {forward['bytes']:,}"),
        ("arithmetic", f"{forward['flops']:,} / {gpu['flops']:,} = {_ms(forward['flops'] / gpu['flops'])} ms"),
        ("memory", f"{forward['bytes']:,} / {gpu['bandwidth']:,} = {_ms(forward['bytes'] / gpu['bandwidth'])} ms"),
        ("perfect kernel", f"{_ms(time['seconds'])} ms, bound by {time['bound']}"),
        ("with our tiles", f"{_ms(time['tile_seconds'])} ms"),
        ("plain causal", f"4 x {dim} x {causal:,} x {heads} / {gpu['flops']:,} = {_ms(time['causal_seconds'])} ms"),
    ]
    return "\n".join(f"{label:<24} {text}" for label, text in lines)


def _counts(rows: list[dict[str, Any]]) -> str:
    head = ["segments", "rows", "visible pairs", "of causal", "forward GFLOP", "MB", "FLOPs per byte"]
    head += ["backward GFLOP", "MB", "FLOPs per byte"]
    cells = []
    for row in rows:
        cells.append(
            [row["segments"], f"{row['rows']:,}", f"{row['visible_pairs']:,}", f"{row['share_of_causal']:.1%}"]
        )
        for key in ("forward", "backward"):
            one = row[key]
            cells[-1] += [significant(one["flops"] / 1e9), significant(one["bytes"] / 1e6)]
            cells[-1].append(f"{one['flops'] / one['bytes']:,.0f}")
    return table(head, cells)


def _times(gpu: str, rows: list[dict[str, Any]]) -> str:
    head = ["segments", "rows", "forward ms", "bound", "tiles", "causal", "backward ms", "bound", "tiles", "causal"]
    cells = []
    for row in rows:
        cells.append([row["segments"], f"{row['rows']:,}"])
        for key in ("forward", "backward"):
            time = row[key]["gpus"][gpu]
            cells[-1] += [_ms(time["seconds"]), time["bound"], _ms(time["tile_seconds"]), f"{_factor(time):.1f}"]
    return table(head, cells)


def _decoding(rows: list[dict[str, Any]], gpus: list[str]) -> list[str]:
    first, full = rows[0], next(row for row in rows if row["raw_rows"] == serving.CONTEXTS[0] + serving.TAIL)
    text = _DECODING.format(
        gists=first["gist_rows"],
        tail=first["raw_rows"],
        few=first["gist_rows"] + first["raw_rows"],
        few_bytes=first["bytes"],
        many=full["raw_rows"],
        many_bytes=full["bytes"],
        ratio=full["bytes"] / first["bytes"],
    )
    cells = []
    for row in rows:
        seen = f"{row['gist_rows']} + {row['raw_rows']}" if row["gist_rows"] else f"{row['raw_rows']:,}"
        times = [significant(row["gpus"][gpu]["seconds"] * 1e6) for gpu in gpus]
        cells.append([row["batch"], seen, f"{row['bytes']:,}", *times])
    return [text, table(["batch", "rows", "bytes", *gpus], cells, text_columns=0)]


def _ms(seconds: float) -> str:
    return significant(seconds * 1e3)
