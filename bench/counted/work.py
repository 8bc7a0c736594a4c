"""How much work the kernels' schedule does, counted in pure Python: tiles, masked tiles, FLOPs, balance.

    make work          # fills docs/internals/work.md

The counts follow the same rules as the kernels (kernels/primitives.py: visible_columns; kernels/attn_bwd_dkv.py:
row intervals and chunks) on the configs a call would pick; tests/bench/test_work.py counts the products that the
kernels really make in the interpreter. Nothing here is a time.
"""

import heapq
from typing import NamedTuple

import numpy as np

from bench.fill import DOCS, fill
from bench.markdown import table
from bench.shapes import layout_of
from gistkern import GistLayout
from gistkern.kernels.chips import Chip, chip_named
from gistkern.kernels.configs import pick
from gistkern.kernels.schedule import chunk_count, pack_heads, padded, section_heads

FAR = 1 << 30
# matrix products per tile: S and P V; S, dP and dS K; S, dP, P^T dO and dS^T Q
PRODUCTS = {"fwd": 2, "bwd_dq": 3, "bwd_dkv": 4}


class Shape(NamedTuple):
    """Heads and head dimension of one sample; Llama-3-8B by default, bf16."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    itemsize: int = 2


class Work(NamedTuple):
    """What one kernel launch does."""

    kernel: str  # name of the config; bwd_dkv counts once for local and once for gist columns
    tiles: int  # visited over all programs
    masked: int  # those of them under a mask
    flops: int  # of the visited tiles, counting whole tiles
    costs: np.ndarray  # tiles of every program, in the order of launch


def visible_pairs(layout: GistLayout) -> int:
    """(query, key) pairs that the mask rule lets through, of one head."""
    begin, end, local = _vectors(layout)
    row = np.arange(layout.num_rows) + layout.tail
    return int((np.maximum(end - begin, 0) + np.maximum(row + 1 - local, 0)).sum())


def least_bytes(layout: GistLayout, shape: Shape, backward: bool = False) -> dict[str, int]:
    """Bytes by tensor that even a perfect kernel moves, each read or written once; of one sample.

    Forward: q, k, v and the compact rows are read, out and lse (fp32) written. Backward: all of these and the gradient
    of out are read, the gradients of the first five written. The layout's own 12 bytes per row do not count.
    """
    width = shape.head_dim * shape.itemsize
    queries = layout.num_rows * shape.heads * width
    keys = layout.num_local * shape.kv_heads * width
    compact = layout.num_compact * shape.kv_heads * width
    inputs = {"q": queries, "k": keys, "v": keys, "gist_k": compact, "gist_v": compact}
    moved = inputs | {"out": queries, "lse": layout.num_rows * shape.heads * 4}
    if backward:
        moved |= {"dout": queries} | {f"d{name}": size for name, size in inputs.items()}
    return moved


def forward_work(layout: GistLayout, shape: Shape, chip: Chip, kernel: str = "fwd") -> Work:
    """The forward's launch, or with ``kernel="bwd_dq"`` the query side of the backward, which walks the same tiles."""
    config = pick(kernel, chip.arch, padded(shape.head_dim), shape.itemsize)
    pack = pack_heads(shape.heads // shape.kv_heads, config.block_rows)
    tiles, full = row_tiles(layout, config.block_rows // pack, config.block_cols)
    packs = shape.heads // pack
    section = _section(packs, layout.num_local + layout.num_compact, shape, chip)
    masked = int((tiles - full).sum()) * packs
    return _work(kernel, _launch_order(tiles[::-1], packs, section), masked, config, shape)


def backward_work(layout: GistLayout, shape: Shape, chip: Chip) -> dict[str, Work]:
    """The three launches of the backward: ``dq``, ``dkv local`` and ``dkv gist``."""
    config = pick("bwd_dkv", chip.arch, padded(shape.head_dim), shape.itemsize)
    group = shape.heads // shape.kv_heads
    pack = pack_heads(group, config.block_rows)
    positions, packs = config.block_rows // pack, group // pack
    works = {"dq": forward_work(layout, shape, chip, "bwd_dq")}
    section = _section(shape.kv_heads, layout.num_rows * group, shape, chip)
    for name, columns in (("local", layout.num_local), ("gist", layout.num_compact)):
        chunks = 1
        if name == "gist":
            units = -(-columns // config.block_cols) * shape.kv_heads
            chunks = chunk_count(units, layout.num_rows, chip.multiprocessors)
        steps, full = column_tiles(layout, name == "gist", config.block_cols, positions, chunks)
        masked = int((steps - full).sum()) * packs * shape.kv_heads
        costs = _launch_order(steps.reshape(-1) * packs, shape.kv_heads, section)
        works[f"dkv {name}"] = _work("bwd_dkv", costs, masked, config, shape)
    return works


def row_tiles(layout: GistLayout, positions: int, block_cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Column tiles that each tile of `positions` rows visits, and how many of them need no mask."""
    begin, end, local = _vectors(layout)
    row = np.arange(layout.num_rows) + layout.tail
    sees_gist, sees_local = begin < end, local <= row
    sees_any = sees_gist | sees_local
    starts = np.arange(0, layout.num_rows, positions)

    def lowest(condition: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.minimum.reduceat(np.where(condition, values, FAR), starts)

    def highest(condition: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.maximum.reduceat(np.where(condition, values, 0), starts)

    gist_lo, local_lo = lowest(sees_gist, begin), lowest(sees_local, local)
    gists = np.maximum(highest(sees_gist, end) - gist_lo, 0)
    locals_ = np.maximum(highest(sees_local, row + 1) - local_lo, 0)
    full_gist = np.clip(lowest(sees_any, end) - gist_lo, 0, gists) * (highest(sees_any, begin) <= gist_lo)
    full_local = np.clip(lowest(sees_any, row) + 1 - local_lo, 0, locals_) * (highest(sees_any, local) <= local_lo)
    full = np.where(full_gist == gists, gists + full_local, full_gist)
    return -(-(gists + locals_) // block_cols), full // block_cols


def uncompacted_tiles(layout: GistLayout, positions: int, block_cols: int) -> int:
    """Column tiles that all row tiles would visit if the gist rows stayed where they are in the token stream.

    That is what a block-sparse kernel on the token mask visits: every aligned tile with a visible key in it.
    """
    begin, end, local = _vectors(layout)
    row = np.arange(layout.num_rows) + layout.tail
    tile_of = layout.gather[0].numpy() // block_cols
    total = 0
    for first in range(0, layout.num_rows, positions):
        rows = slice(first, min(first + positions, layout.num_rows))
        gists, locals_ = begin[rows] < end[rows], local[rows] <= row[rows]
        touched: set[int] = set()
        if gists.any():
            touched |= set(tile_of[begin[rows][gists].min() : end[rows][gists].max()].tolist())
        if locals_.any():
            lowest = local[rows][locals_].min() // block_cols
            touched |= set(range(lowest, row[rows][locals_].max() // block_cols + 1))
        total += len(touched)
    return total


def column_tiles(
    layout: GistLayout, gist: bool, block_cols: int, positions: int, chunks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row steps ``[column tiles, chunks]`` of dk and dv, and how many of them need no mask."""
    begin, end, local = _vectors(layout)
    columns = layout.num_compact if gist else layout.num_local
    first = np.arange(0, columns, block_cols)
    last = np.minimum(first + block_cols, columns) - 1
    if gist:
        row_begin, full_begin = (np.searchsorted(end, value, side="right") for value in (first, last))
        row_end, full_end = (np.searchsorted(begin, value, side="right") for value in (last, first))
    else:
        row_begin, full_begin = (np.maximum(value - layout.tail, 0) for value in (first, last))
        row_end, full_end = (np.searchsorted(local, value, side="right") for value in (last, first))
    steps = np.maximum(-(-(row_end - row_begin) // positions), 0)
    per_chunk = -(-steps // chunks)
    starts = row_begin[:, None] + np.arange(chunks) * (per_chunk * positions)[:, None]
    ends = np.minimum(row_end[:, None], starts + (per_chunk * positions)[:, None])
    counts = np.maximum(-(-(ends - starts) // positions), 0)
    # a step at row r is full if full_begin <= r and r + positions <= full_end
    before = np.clip(-(-(full_begin[:, None] - starts) // positions), 0, counts)
    until = np.clip((full_end[:, None] - starts) // positions, 0, counts)
    return counts, np.maximum(until - before, 0)


def balance(costs: np.ndarray, slots: int) -> float:
    """Mean over maximum load when programs go, in order, to the first free of `slots` multiprocessors."""
    loads = [0] * slots
    for cost in costs.tolist():
        heapq.heapreplace(loads, loads[0] + cost)
    return float(costs.sum()) / (slots * max(loads)) if costs.sum() else 1.0


def _vectors(layout: GistLayout) -> list[np.ndarray]:
    return [t[0].numpy().astype(np.int64) for t in (layout.gist_begin, layout.gist_end, layout.local_begin)]


def _section(heads: int, rows: int, shape: Shape, chip: Chip) -> int:
    return section_heads(heads, 2 * rows * shape.head_dim * shape.itemsize, chip.l2_bytes)


def _launch_order(tiles: np.ndarray, heads: int, section: int) -> np.ndarray:
    widths = [min(section, heads - start) for start in range(0, heads, section)]
    return np.concatenate([np.repeat(tiles, width) for width in widths])


def _work(kernel: str, costs: np.ndarray, masked: int, config, shape: Shape) -> Work:
    tiles = int(costs.sum())
    flops = 2 * PRODUCTS[kernel] * tiles * config.block_rows * config.block_cols * shape.head_dim
    return Work(kernel, tiles, masked, flops, costs)


COUNTED = ("64/4", "256/16", "256/64", "1024/128", "one segment")
ROWS = (4096, 16384, 131072)
ARCHES = ("sm_80", "sm_90", "sm_100")


def ratios(layout: GistLayout, works: dict[str, Work], shape: Shape) -> tuple[float, float]:
    """FLOPs of the visited tiles over those of the visible pairs alone: of the forward, and of the backward."""
    per_product = 2 * visible_pairs(layout) * shape.heads * shape.head_dim
    backward = sum(work.flops for name, work in works.items() if name != "forward")
    products = PRODUCTS["bwd_dq"] + PRODUCTS["bwd_dkv"]
    return works["forward"].flops / (PRODUCTS["fwd"] * per_product), backward / (products * per_product)


def counted(name: str, rows: int) -> list[str]:
    """A line of the table: ratios of every chip, the rest of the second one's."""
    layout, shape, chips = layout_of(name, rows), Shape(), [chip_named(arch) for arch in ARCHES]
    works = [{"forward": forward_work(layout, shape, chip), **backward_work(layout, shape, chip)} for chip in chips]
    found = zip(*(ratios(layout, one, shape) for one in works), strict=True)
    shown, chip = works[1], chips[1]
    config = pick("fwd", ARCHES[1], padded(shape.head_dim), shape.itemsize)
    pack = pack_heads(shape.heads // shape.kv_heads, config.block_rows)
    scattered = uncompacted_tiles(layout, config.block_rows // pack, config.block_cols) * shape.heads // pack
    forward = shown["forward"]
    return [
        *(name, f"{rows:,}", f"{visible_pairs(layout) / (rows * (rows + 1) / 2):.1%}"),
        *(f"{ratio:.2f}" for one in found for ratio in one),
        *(f"{scattered / forward.tiles:.2f}", f"{forward.masked / forward.tiles:.1%}"),
        *(f"{balance(shown[key].costs, chip.multiprocessors):.2f}" for key in ("forward", "dkv local", "dkv gist")),
    ]


def tables() -> dict[str, str]:
    """The table of docs/internals/work.md."""
    head = ["segments", "rows", "pairs of causal"]
    head += [f"{key}, {arch}" for key in ("forward", "backward") for arch in ARCHES]
    head += ["uncompacted", "masked", "balance, forward", "dk/dv local", "dk/dv gist"]
    return {"work": table(head, [counted(name, rows) for name in COUNTED for rows in ROWS])}


if __name__ == "__main__":
    fill(DOCS / "internals" / "work.md", tables())
