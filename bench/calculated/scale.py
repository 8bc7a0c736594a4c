"""Contexts of a million tokens and more over many GPUs, calculated: traffic, memory and time of a layer.

    make scale                                         # fills docs/internals/scale.md

Nothing here ran on several GPUs. Pairs come from the layouts, shards from `gistkern.distributed.split_layout`, as a
training step would cut them; speeds are published peaks, of the card and of its links.
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.calculated.serving import LLAMA_3_8B
from bench.fill import DOCS, fill
from bench.markdown import columns, significant
from bench.shapes import layout_of
from gistkern import GistLayout
from gistkern.distributed import split_layout
from gistkern.kernels.chips import LINKS, gpu_named

GPU = "H100 SXM 80 GB"
ITEM = 2  # bytes of bf16
NODE = 8
ROW = 2 * LLAMA_3_8B.num_key_value_heads * LLAMA_3_8B.head_dim * ITEM  # bytes of a key and a value
SCHEMES = ("512/8", "hierarchical")
CASES = tuple((tokens, ranks) for tokens, many in ((1 << 20, (8, 64)), (10 << 20, (64, 1024))) for ranks in many)


class Scale(NamedTuple):
    """One layer's forward on the busiest rank. Sizes in bytes, times in seconds."""

    scheme: str
    tokens: int
    ranks: int
    gist_rows: int  # compact rows of the whole context
    received: int  # by a rank: gist rows of all others
    ring: int  # and in ring attention: keys and values of all others
    kept: int  # keys and values of a rank for the backward: its own rows, and the compact rows
    compute: float  # products of the heaviest shard at the card's peak
    full_compute: float  # of its share under full causal attention, evenly cut
    balance: float  # mean over largest work of a shard
    padding: float  # rows that all ranks send over compact rows
    link: str  # the slowest in use

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
    """The table of docs/internals/scale.md."""

    def shown(name: str, factor: float) -> Callable[[Any], str]:
        return lambda row: significant(factor * row[name])

    rows = [
        one._asdict() | {"receiving": one.seconds(one.received), "ring time": one.seconds(one.ring)} for one in scales
    ]
    cells = {"layout": "scheme", "tokens": "tokens", "GPUs": "ranks", "gist rows": "gist_rows"}
    sizes = {"received, MB": shown("received", 1e-6), "ring, MB": shown("ring", 1e-6), "link": "link"}
    times = {"receiving, ms": shown("receiving", 1e3), "ring, ms": shown("ring time", 1e3)}
    times |= {"products, ms": shown("compute", 1e3), "full attention, ms": shown("full_compute", 1e3)}
    rest = {"kept K/V, MB": shown("kept", 1e-6), "padding": lambda row: f"{row['padding']:.1f}"}
    return {"cases": columns(rows, cells | sizes | times | rest | {"balance": lambda row: f"{row['balance']:.2f}"})}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    scales = []
    for tokens in dict.fromkeys(tokens for tokens, _ in CASES):
        for scheme in SCHEMES:
            layout = layout_of(scheme, tokens)
            scales += [calculated(layout, scheme, ranks) for one, ranks in CASES if one == tokens]
    fill(DOCS / "internals" / "scale.md", tables(scales))


if __name__ == "__main__":
    main()
