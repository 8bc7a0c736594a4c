"""Contexts of a million tokens and more over many GPUs, calculated: traffic, memory and time of a layer.

    make scale                                         # fills docs/scale.md

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
from bench.fill import fill
from bench.markdown import significant, table
from bench.shapes import layout_of
from gistkern import GistLayout
from gistkern.distributed import split_layout
from gistkern.kernels.chips import LINKS, gpu_named

__all__ = ["CASES", "GPU", "Scale", "calculated", "gist_bytes", "layer_weights", "main", "ring_bytes", "tables"]

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


def tables(scales: Sequence[Scale]) -> dict[str, str]:
    """The table of docs/scale.md."""
    head = ["layout", "tokens", "GPUs", "gist rows", "received, MB", "ring, MB", "link"]
    head += ["receiving, ms", "ring, ms", "products, ms", "full attention, ms", "kept K/V, MB", "padding", "balance"]
    rows = [
        [
            one.scheme,
            *(f"{count:,}" for count in (one.tokens, one.ranks, one.gist_rows)),
            *(significant(size / 1e6) for size in (one.received, one.ring)),
            one.link,
            *(
                significant(1e3 * seconds)
                for seconds in (one.seconds(one.received), one.seconds(one.ring), one.compute, one.full_compute)
            ),
            significant(one.kept / 1e6),
            f"{one.padding:.1f}",
            f"{one.balance:.2f}",
        ]
        for one in scales
    ]
    return {"cases": table(head, rows)}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    scales = []
    for tokens in dict.fromkeys(tokens for tokens, _ in CASES):
        for scheme in SCHEMES:
            layout = layout_of(scheme, tokens)
            scales += [calculated(layout, scheme, ranks) for one, ranks in CASES if one == tokens]
    fill(DOCS / "scale.md", tables(scales))


if __name__ == "__main__":
    main()
