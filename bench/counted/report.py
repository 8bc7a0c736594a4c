"""Fill docs/evidence/work.md with what bench/counted/work.py counts.

make work
make work ARGS="--rows rows.json"     # every chip, layout and length, with tiles, FLOPs and balance of each launch
"""

import argparse
from pathlib import Path
from typing import Any

from bench.counted.work import (
    PRODUCTS,
    Shape,
    Work,
    backward_work,
    balance,
    forward_work,
    uncompacted_tiles,
    visible_pairs,
)
from bench.fill import DOCS, fill
from bench.markdown import table
from bench.rows import write_report
from bench.shapes import layout_of
from gistkern.kernels.chips import chip_named
from gistkern.kernels.configs import pick
from gistkern.kernels.schedule import pack_heads, padded

COUNTED = ("64/4", "256/16", "256/64", "1024/128", "one segment")
ROWS = (4096, 8192, 16384, 32768, 65536, 131072)
ARCHES = ("sm_80", "sm_90", "sm_100")
SHOWN_ROWS = (4096, 16384, 131072)


def count(name: str, rows: int, arch: str, shape: Shape) -> dict[str, Any]:
    """One row of the report."""
    chip = chip_named(arch)
    layout = layout_of(name, rows)
    pairs = visible_pairs(layout)
    per_product = 2 * pairs * shape.heads * shape.head_dim
    works = {"forward": forward_work(layout, shape, chip), **backward_work(layout, shape, chip)}
    config = pick("fwd", arch, padded(shape.head_dim), shape.itemsize)
    pack = pack_heads(shape.heads // shape.kv_heads, config.block_rows)
    scattered = uncompacted_tiles(layout, config.block_rows // pack, config.block_cols) * shape.heads // pack
    backward = sum(work.flops for key, work in works.items() if key != "forward")
    return {
        "segments": name,
        "rows": rows,
        "arch": arch,
        "multiprocessors": chip.multiprocessors,
        "visible_pairs": pairs,
        "share_of_causal": pairs / (rows * (rows + 1) / 2),
        "tiles_without_compaction": scattered / works["forward"].tiles,
        "forward_ratio": works["forward"].flops / (PRODUCTS["fwd"] * per_product),
        "backward_ratio": backward / ((PRODUCTS["bwd_dq"] + PRODUCTS["bwd_dkv"]) * per_product),
        "launches": {key: _launch(work, chip.multiprocessors) for key, work in works.items()},
    }


def _launch(work: Work, multiprocessors: int) -> dict[str, Any]:
    return {
        "programs": len(work.costs),
        "tiles": work.tiles,
        "masked_tiles": work.masked,
        "flops": work.flops,
        "balance": balance(work.costs, multiprocessors),
    }


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The table of docs/evidence/work.md: ratios of every chip, the rest of the second one's."""
    found = {(row["segments"], row["rows"], row["arch"]): row for row in rows}
    head = ["segments", "rows", "pairs of causal"]
    head += [f"{key}, {arch}" for key in ("forward", "backward") for arch in ARCHES]
    head += ["uncompacted", "masked", "balance, forward", "dk/dv local", "dk/dv gist"]
    lines = []
    for name in COUNTED:
        for size in SHOWN_ROWS:
            chips = [found[name, size, arch] for arch in ARCHES]
            ratios = [f"{row[f'{key}_ratio']:.2f}" for key in ("forward", "backward") for row in chips]
            shown = found[name, size, ARCHES[1]]
            launches = shown["launches"]
            masked = launches["forward"]["masked_tiles"] / launches["forward"]["tiles"]
            balances = [f"{launches[key]['balance']:.2f}" for key in ("forward", "dkv local", "dkv gist")]
            line = [name, f"{size:,}", f"{shown['share_of_causal']:.1%}", *ratios]
            lines.append([*line, f"{shown['tiles_without_compaction']:.2f}", f"{masked:.1%}", *balances])
    return {"work": table(head, lines)}


def main(arguments: list[str] | None = None) -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, metavar="REPORT.json", help="write every row, and leave the page alone")
    given = parser.parse_args(arguments)
    rows = [count(name, rows, arch, Shape()) for arch in ARCHES for name in COUNTED for rows in ROWS]
    if given.rows:
        write_report(given.rows, {"grade": "emulated", "command": "make work", "rows": rows})
    else:
        fill(DOCS / "evidence" / "work.md", tables(rows))


if __name__ == "__main__":
    main()
