"""Contexts of a million tokens and more over many GPUs, calculated: traffic, memory and time of a layer.

    make scale                                         # writes docs/scale.md

Nothing here ran on several GPUs. Pairs come from the layouts, shards from `gistkern.distributed.split_layout`, as a
training step would cut them; speeds are published peaks, of the card and of its links.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.calculated.serving import LLAMA_3_8B
from bench.markdown import bullets, significant, table
from bench.shapes import layout_of
from gistkern import GistLayout
from gistkern.distributed import split_layout
from gistkern.kernels.chips import LINKS, gpu_named

__all__ = ["CASES", "GPU", "Scale", "calculated", "gist_bytes", "layer_weights", "main", "page", "ring_bytes"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
GPU = "H100 SXM 80 GB"
ITEM = 2  # bytes of bf16
NODE = 8
ROW = 2 * LLAMA_3_8B.num_key_value_heads * LLAMA_3_8B.head_dim * ITEM  # bytes of a key and a value
SCHEMES = ("512/8", "hierarchical")
CASES = tuple((tokens, ranks) for tokens, many in ((1 << 20, (8, 64)), (10 << 20, (64, 1024))) for ranks in many)


@dataclass(frozen=True)
class Scale:
    """One layer's forward on the busiest rank.

    Parameters
    ----------
    scheme, tokens, ranks
        Layout (bench/shapes.py), rows of the context, GPUs.
    gist_rows : int
        Compact rows of the whole context.
    received, ring : int
        Bytes that a rank receives: gist rows of all others, and in ring attention keys and values of all others.
    kept : int
        Bytes of keys and values that a rank keeps for the backward: its own rows, and the compact rows.
    compute, full_compute : float
        Seconds of matrix products at the card's peak: of the heaviest shard, and of its share under full causal
        attention, evenly cut.
    balance : float
        Mean over largest work of a shard.
    padding : float
        Rows that all ranks send over compact rows.
    link : str
        The slowest link in use.
    """

    scheme: str
    tokens: int
    ranks: int
    gist_rows: int
    received: int
    ring: int
    kept: int
    compute: float
    full_compute: float
    balance: float
    padding: float
    link: str

    def seconds(self, size: int) -> float:
        """Of receiving so many bytes at the link's published speed."""
        return size / LINKS[self.link]


def gist_bytes(rows: int, ranks: int, kv_heads: int, head_dim: int, itemsize: int, grad_itemsize: int = 0) -> int:
    """Bytes that a rank receives per layer: keys and values of `rows` compact rows, of which every rank owns as many.

    With `grad_itemsize` those of the backward too: gradients of the rows that it owns, from every other rank.
    """
    per_row = 2 * kv_heads * head_dim * (itemsize + grad_itemsize)
    return rows * (ranks - 1) // ranks * per_row


def ring_bytes(rows: int, ranks: int, kv_heads: int, head_dim: int, itemsize: int, backward: bool = False) -> int:
    """What ring attention (Liu et al. 2023, "Ring Attention with Blockwise Transformers", section 3) receives.

    Per layer and rank: in the forward the keys and values of all other ranks pass by; in the backward they pass by
    once more, and their gradients with them.
    """
    per_row = 2 * kv_heads * head_dim * itemsize
    return rows * (ranks - 1) // ranks * per_row * (3 if backward else 1)


def layer_weights() -> int:
    """Weights of one layer's matrices."""
    model = LLAMA_3_8B
    projections = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    return model.hidden_size * (projections * model.head_dim + 3 * model.intermediate_size)


def calculated(layout: GistLayout, scheme: str, ranks: int) -> Scale:
    """One case."""
    gpu, model = gpu_named(GPU), LLAMA_3_8B
    per_pair = 4 * model.head_dim * model.num_attention_heads  # FLOPs of two products
    per_row = 2 * layer_weights()
    with warnings.catch_warnings():  # unevenness is a column
        warnings.simplefilter("ignore")
        shards = split_layout(layout, ranks, row_cost=per_row / per_pair)
    rows, heaviest = layout.num_rows, max(shard.work for shard in shards)
    mean = sum(shard.work for shard in shards) / ranks
    owed = ranks * shards[0].own.shape[1]  # every rank's part is as long as the longest
    local = max(shard.end - shard.begin for shard in shards)
    full = rows * (rows + 1) // 2 / ranks * per_pair + rows / ranks * per_row
    return Scale(
        scheme=scheme,
        tokens=rows,
        ranks=ranks,
        gist_rows=layout.num_compact,
        received=gist_bytes(owed, ranks, model.num_key_value_heads, model.head_dim, ITEM),
        ring=ring_bytes(rows, ranks, model.num_key_value_heads, model.head_dim, ITEM),
        kept=(local + layout.num_compact) * ROW,
        compute=heaviest * per_pair / gpu.flops,
        full_compute=full / gpu.flops,
        balance=mean / heaviest,
        padding=owed / layout.num_compact,
        link="NVLink" if ranks <= NODE else "InfiniBand",
    )


_PAGE = """# A million tokens and more, calculated

**Calculated, not measured.** Written by `make scale` (bench/calculated): {model} sizes, bf16, forward of one layer
on the busiest of R {gpu} at {flops} TFLOP/s of dense bf16, {nvlink:.0f} GB/s received over NVLink within a node of
{node} (NVIDIA H100 datasheet: 900 GB/s both ways), {infiniband:.0f} GB/s between nodes (one 400 Gb/s adapter per GPU,
as in NVIDIA's DGX H100 datasheet). Nobody ran this. Shards are those that `split_layout` cuts, pairs are what the
mask shows; matrix products alone count, at peak, so times are lower bounds. The traffic is counted in the tests of
context parallelism at small sizes and equals this arithmetic ([distributed.md](distributed.md)).

*512/8*: segments of 512 with 8 gists that see all earlier gists. *hierarchical*: segments of 256 with 8 gists that do
not see each other's, and a summary of 10. *Ring*: ring attention with full causal attention over the same tokens,
evenly cut (Liu et al. 2023). The backward receives the gradients of gist rows in fp32, twice the forward's bytes; a
ring's backward twice its forward's too.

{rows}

What this says:

{said}
"""


def page(scales: Sequence[Scale]) -> str:
    """The page of some cases."""
    head = [
        "layout",
        "tokens",
        "GPUs",
        "gist rows",
        "received, gists",
        "ring",
        "fewer",
        "link",
        "time to receive, gists",
        "ring",
        "compute, gists",
        "full attention",
        "kept K/V of a layer",
        "balance",
    ]
    rows = [
        [
            one.scheme,
            f"{one.tokens:,}",
            f"{one.ranks:,}",
            f"{one.gist_rows:,}",
            f"{significant(one.received / 1e6)} MB",
            f"{significant(one.ring / 1e6)} MB",
            f"{one.ring / one.received:,.0f}x",
            one.link,
            f"{significant(1e3 * one.seconds(one.received))} ms",
            f"{significant(1e3 * one.seconds(one.ring))} ms",
            f"{significant(1e3 * one.compute)} ms",
            f"{significant(1e3 * one.full_compute)} ms",
            f"{significant(one.kept / 1e6)} MB",
            f"{one.balance:.2f}",
        ]
        for one in scales
    ]
    gpu = gpu_named(GPU)
    return _PAGE.format(
        model="Llama-3-8B",
        gpu=gpu.name,
        flops=f"{gpu.flops / 1e12:.1f}",
        node=NODE,
        nvlink=LINKS["NVLink"] / 1e9,
        infiniband=LINKS["InfiniBand"] / 1e9,
        rows=table(head, rows),
        said=bullets(_said(scales)),
    )


def _said(scales: Sequence[Scale]) -> list[str]:
    """What holds of the numbers above, with the numbers."""
    hidden = [one for one in scales if one.seconds(one.received) < one.compute]
    ring = [one for one in scales if one.seconds(one.ring) > one.compute]
    worst = min(scales, key=lambda one: one.balance)
    share = max(one.gist_rows * ROW / one.kept for one in scales)
    padded = max(scales, key=lambda one: one.padding)
    return [
        f"In {len(hidden)} of {len(scales)} cases the gist rows arrive in less time than the layer's products take; a "
        f"ring's keys and values would take longer than the same products in {len(ring)}.",
        f"The least even cut is that of {worst.scheme}, {worst.tokens:,} tokens on {worst.ranks:,} GPUs: "
        f"{worst.balance:.2f}.",
        "Every rank's part of the exchange is as long as the longest. Early shards, which see few gists, are long and "
        f"own many: up to {padded.padding:.1f} times the rows that are needed ({padded.scheme}, {padded.tokens:,} "
        f"tokens on {padded.ranks:,} GPUs).",
        f"Every rank holds all compact rows, up to {share:.0%} of what it keeps: more ranks do not help there, a "
        "summary that replaces the gists of its segments does.",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    scales = []
    for tokens in dict.fromkeys(tokens for tokens, _ in CASES):
        for scheme in SCHEMES:
            layout = layout_of(scheme, tokens)
            scales += [calculated(layout, scheme, ranks) for one, ranks in CASES if one == tokens]
    (DOCS / "scale.md").write_text(page(scales), encoding="utf-8")


if __name__ == "__main__":
    main()
