"""Write what bench/counted/work.py counts as docs/evidence/work.json, work.md and a plot.

make work
"""

from __future__ import annotations

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
from bench.rows import write_report
from bench.shapes import layout_of
from gistkern.kernels.chips import chip_named
from gistkern.kernels.configs import pick
from gistkern.kernels.schedule import pack_heads, padded

COUNTED = ("64/4", "256/16", "256/64", "1024/128", "one segment")
ROWS = (4096, 8192, 16384, 32768, 65536, 131072)
ARCHES = ("sm_80", "sm_90", "sm_100")
TARGET = 1.1
BALANCE_TARGET = 0.9
COLUMNS = (
    "segments",
    "rows",
    "pairs of causal",
    "forward ratio",
    "masked tiles",
    "uncompacted",
    "backward ratio",
    "balance forward",
    "dq",
    "dk/dv local",
    "dk/dv gist",
)
ROOT = Path(__file__).parents[2]


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


def markdown(rows: list[dict[str, Any]], shape: Shape) -> str:
    """The evidence page."""
    lines = [
        "# Work of the schedule",
        "",
        "Counted by `make work` (bench/counted/work.py) from the layouts and the shipped configs; the counts equal the",
        "products that the kernels make in the interpreter (tests/bench/test_work.py). Grade: *emulated*; no",
        "time was measured.",
        "",
        f"Heads {shape.heads}/{shape.kv_heads}, head dimension {shape.head_dim}, bf16, batch 1.",
        "",
        "- *Ratio*: FLOPs of the visited tiles, whole tiles counted, over those of the visible pairs alone. Backward:",
        "  dq and dk/dv together, each with its own recomputation of the scores.",
        "- *Uncompacted*: forward tiles of a block-sparse kernel that leaves the gists in the token stream, over ours.",
        "- *Balance*: mean over maximum load if programs go in launch order to the first free multiprocessor, one at a",
        "  time.",
        f"- Targets: ratio at most {TARGET} for 256/16 and coarser, balance of the gist dk/dv at least",
        f'  {BALANCE_TARGET} at 32K. **Bold** misses its target; docs/kernels.md, "Work", says why.',
        "",
        "![ratio and balance](../pictures/work.png)",
    ]
    for arch in ARCHES:
        mine = [row for row in rows if row["arch"] == arch]
        lines += [
            "",
            f"## {arch}, {mine[0]['multiprocessors']} multiprocessors",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
        ]
        for row in mine:
            launches = row["launches"]
            bound = row["segments"] != "64/4"
            masked = launches["forward"]["masked_tiles"] / launches["forward"]["tiles"]
            ratios = [
                _bold(row[f"{key}_ratio"], bound and row[f"{key}_ratio"] > TARGET) for key in ("forward", "backward")
            ]
            gist = launches["dkv gist"]["balance"]
            cells = [
                row["segments"],
                f"{row['rows']:,}",
                f"{row['share_of_causal']:.1%}",
                ratios[0],
                f"{masked:.1%}",
                f"{row['tiles_without_compaction']:.2f}",
                ratios[1],
                *(f"{launches[key]['balance']:.3f}" for key in ("forward", "dq", "dkv local")),
                _bold(gist, row["rows"] == 32768 and bound and gist < BALANCE_TARGET),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _bold(value: float, missed: bool) -> str:
    return f"**{value:.3f}**" if missed else f"{value:.3f}"


def draw(rows: list[dict[str, Any]], path: Path, arch: str = "sm_90") -> None:
    """Ratios and the gist columns' balance over N, one line per segment size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "forward: FLOPs over ideal": lambda row: row["forward_ratio"],
        "backward: FLOPs over ideal": lambda row: row["backward_ratio"],
        "balance of gist dk/dv": lambda row: row["launches"]["dkv gist"]["balance"],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for name in COUNTED:
            mine = [row for row in rows if row["arch"] == arch and row["segments"] == name]
            axis.plot([row["rows"] for row in mine], [value(row) for row in mine], marker="o", markersize=3, label=name)
        axis.axhline(BALANCE_TARGET if "balance" in title else TARGET, color="grey", linestyle=":", linewidth=1)
        axis.set(title=title, xlabel="tokens", xscale="log")
        axis.set_xticks(ROWS, [f"{rows // 1024}K" for rows in ROWS])
        axis.minorticks_off()
    axes[0].legend(title="raw/gists", fontsize=8)
    figure.suptitle(f"Counted work on {arch}'s tiles (dotted: targets); no time was measured", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder with evidence/ and pictures/")
    out = parser.parse_args().out
    shape = Shape()
    rows = [count(name, rows, arch, shape) for arch in ARCHES for name in COUNTED for rows in ROWS]
    (out / "evidence").mkdir(parents=True, exist_ok=True)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    write_report(out / "evidence/work.json", {"command": "make work", "rows": rows})
    (out / "evidence/work.md").write_text(markdown(rows, shape))
    draw(rows, out / "pictures/work.png")


if __name__ == "__main__":
    main()
