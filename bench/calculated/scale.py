"""Contexts of a million tokens and more over many GPUs, calculated: traffic, memory and time of a layer.

    make scale                                         # fills docs/internals/scale.md

Nothing here ran on several GPUs. Pairs come from the layouts, shards from `gistkern.distributed.split_layout`, as a
training step would cut them; speeds are published peaks, of the card and of its links.
"""

import warnings
from collections.abc import Callable
from typing import Any

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


def calculated(layout: GistLayout, scheme: str, ranks: int) -> dict[str, Any]:
    """One layer's forward on the busiest rank, by what the table calls it: bytes, seconds and ratios."""
    gpu, model = gpu_named(GPU), LLAMA_3_8B
    per_pair = 4 * model.head_dim * model.num_attention_heads  # FLOPs of two products
    per_row = 2 * layer_weights()
    with warnings.catch_warnings():  # unevenness is a column
        warnings.simplefilter("ignore")
        shards = split_layout(layout, ranks, row_cost=per_row / per_pair)
    rows, heaviest = layout.num_rows, max(shard.work for shard in shards)
    owed = ranks * shards[0].own.shape[1]  # every rank's part is as long as the longest
    link = "NVLink" if ranks <= NODE else "InfiniBand"  # the slowest in use
    received = gist_bytes(owed, ranks, model.num_key_value_heads, model.head_dim, ITEM)
    ring = ring_bytes(rows, ranks, model.num_key_value_heads, model.head_dim, ITEM)
    full = rows * (rows + 1) // 2 / ranks * per_pair + rows / ranks * per_row
    return {
        "layout": scheme,
        "tokens": rows,
        "GPUs": ranks,
        "gist rows": layout.num_compact,  # of the whole context
        "received, MB": received / 1e6,  # by a rank: gist rows of all others
        "ring, MB": ring / 1e6,  # and in ring attention: keys and values of all others
        "link": link,
        "receiving, ms": 1e3 * received / LINKS[link],
        "ring, ms": 1e3 * ring / LINKS[link],
        "products, ms": 1e3 * heaviest * per_pair / gpu.flops,  # of the heaviest shard at the card's peak
        "full attention, ms": 1e3 * full / gpu.flops,  # of a rank's share under full causal attention, evenly cut
        # keys and values of a rank for the backward: its own rows, and the compact rows
        "kept K/V, MB": (max(shard.end - shard.begin for shard in shards) + layout.num_compact) * ROW / 1e6,
        "padding": owed / layout.num_compact,  # rows that all ranks send over compact rows
        "balance": sum(shard.work for shard in shards) / ranks / heaviest,  # mean over largest work of a shard
    }


def tables(cases: list[dict[str, Any]]) -> dict[str, str]:
    """The table of docs/internals/scale.md."""
    digits = {"padding": 1, "balance": 2}

    def cell(name: str) -> Callable[[Any], Any]:
        if name in digits:
            return lambda case: f"{case[name]:.{digits[name]}f}"
        return lambda case: significant(case[name]) if isinstance(case[name], float) else case[name]

    return {"cases": columns(cases, {name: cell(name) for name in cases[0]})}


def main() -> None:
    """Fill the page."""
    cases = []
    for tokens in dict.fromkeys(tokens for tokens, _ in CASES):
        for scheme in SCHEMES:
            layout = layout_of(scheme, tokens)
            cases += [calculated(layout, scheme, ranks) for one, ranks in CASES if one == tokens]
    fill(DOCS / "internals" / "scale.md", tables(cases))


if __name__ == "__main__":
    main()
