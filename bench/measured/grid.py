"""What is measured on which device: the sizes of every section of reports, in one place."""

from dataclasses import dataclass, replace

from bench.measured.attention import PASSES
from bench.measured.baselines import BASELINES
from bench.measured.case import OURS
from bench.shapes import LAYOUTS

SMOLLM2, LLAMA, SMALL = "SmolLM2-135M", "Llama-3-8B", "2 heads, D 64"
# its ratios are the whole model's; a time of it is a quarter, but for the embedding and the last row's logits
EIGHT = "Llama-3-8B, 8 of 32 layers"
ONCE = "forward", "both"  # the backward alone is left out where a round takes minutes


@dataclass(frozen=True)
class Grid:
    """Sizes of one device."""

    attention: tuple[tuple[str, int, str, tuple[str, ...]], ...]  # (layout, rows, heads, passes)
    growth_heads: str
    growth: tuple[int, ...]  # rows
    growth_baselines: int  # baselines get the rows up to this
    compaction: tuple[tuple[str, int, str], ...]  # (layout, rows, heads)
    decoding: tuple[tuple[int, int, int, str], ...]  # (gist rows, tail rows, batch, heads)
    models: tuple[tuple[str, int, tuple[int, ...]], ...]  # (model, context, batches)
    compressing: tuple[tuple[str, int, int, int], ...]  # (model, tokens, of a segment, of a call)
    layouts: tuple[tuple[str, int], ...]  # (layout, rows)
    memory: tuple[tuple[tuple[object, ...], tuple[str, ...]], ...]  # (case, names), as `peak_bytes` takes them
    baselines: tuple[str, ...] = tuple(BASELINES)  # of the attention section
    queueing: tuple[str, ...] = ()  # heads
    generating: tuple[tuple[str], ...] = ()  # models
    training: tuple[tuple[str, str, int], ...] = ()  # (model, layout, rows)
    checks: tuple[int, tuple[tuple[int, int, int], ...], str] = (0, (), "")  # rows; decoding; heads
    tiles: tuple[int, tuple[str, ...]] = (0, ())  # rows, kernels


_BATCHES = (1, 4, 16, 64, 256)
_DECODING = ((10, 16, 1), (10, 16, 16), (10, 16, 256), (256, 64, 1), (1024, 64, 16), (16384, 64, 1))
_COMPRESSING = (OURS, "compress, one segment", "plain prefill")

GRIDS = {
    "cpu": Grid(
        attention=(
            ("512/8", 1024, SMOLLM2, PASSES),
            *((name, 4096, SMOLLM2, PASSES if name == "512/8" else ONCE) for name in LAYOUTS),
            ("512/8", 16384, SMOLLM2, ONCE),
            ("512/8", 2048, LLAMA, PASSES),
        ),
        growth_heads=SMALL,
        growth=(1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
        growth_baselines=16384,
        compaction=(("64/4", 4096, LLAMA), ("512/8", 16384, LLAMA)),
        decoding=tuple((*sizes, LLAMA) for sizes in _DECODING),
        models=((SMOLLM2, 64, _BATCHES), (SMOLLM2, 4096, _BATCHES), ("Llama-3-8B, 2 of 32 layers", 4096, (1, 16))),
        compressing=tuple(("SmolLM2-135M, 4 of 30 layers", tokens, 512, 512) for tokens in (1024, 4096)),
        layouts=(("64/4", 4096), ("512/8", 4096), ("512/8", 16384)),
        memory=(
            (("attention", "512/8", 8192, SMALL, "forward", "cpu"), (OURS, *BASELINES)),
            (("attention", "512/8", 8192, SMALL, "both", "cpu"), (OURS, *BASELINES)),
            (("compressing", "SmolLM2-135M, 4 of 30 layers", 4096, "cpu"), _COMPRESSING),
        ),
    ),
    # what `make gpu` has time for comes first; growth, compaction, layouts and memory are measured when they are named
    "cuda": Grid(
        attention=(
            ("512/8", 16384, LLAMA, ONCE),
            ("one segment", 16384, LLAMA, ONCE),
            ("512/8", 4096, LLAMA, ("both",)),
            ("hierarchical", 16384, LLAMA, ONCE),
            ("packed", 16384, LLAMA, ONCE),
            *((name, 16384, LLAMA, ("forward",)) for name in ("64/4", "256/16", "256/64", "1024/128", "sliding")),
            ("512/8", 131072, LLAMA, ("forward",)),
        ),
        growth_heads=LLAMA,
        growth=(1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072),
        growth_baselines=131072,
        compaction=(("64/4", 4096, LLAMA), ("512/8", 16384, LLAMA), ("64/4", 131072, LLAMA)),
        # 27, 64, 68, 256 and 512 MiB of keys and values
        decoding=tuple(
            (*sizes, LLAMA)
            for sizes in (
                *((10, 16, 256), (1024, 64, 16), (16384, 64, 1), (1024, 64, 60), (65536, 64, 1)),
                *((1024, 64, 120), (131072, 64, 1), *_DECODING[:2]),
            )
        ),
        models=((SMOLLM2, 4096, (1, 16)), (EIGHT, 4096, (1, 16, 64))),
        compressing=(
            *((EIGHT, 16384, 512, call) for call in (4096, 1024, 2048, 8192, 16384)),
            *((EIGHT, 16384, segment, 4096) for segment in (128, 2048)),
        ),
        layouts=(("64/4", 4096), ("512/8", 16384)),
        memory=(
            (("attention", "512/8", 16384, LLAMA, "forward", "cuda"), (OURS, *BASELINES)),
            (("attention", "512/8", 16384, LLAMA, "both", "cuda"), (OURS, *BASELINES)),
            (("compressing", LLAMA, 16384, "cuda"), _COMPRESSING),
        ),
        queueing=(LLAMA,),
        generating=((EIGHT,), (SMOLLM2,)),
        training=(("Llama-3-8B, 2 of 32 layers", "512/8", 8192), ("Llama-3-8B, 2 of 32 layers", "256/16", 8192)),
        checks=(2048, ((10, 16, 256), (16384, 64, 1), (1024, 64, 120), (131072, 64, 1)), LLAMA),
        tiles=(16384, ("fwd", "bwd_dkv")),
        # FlexAttention compiles for ten seconds and more a layout: once, with its keys in the better order
        baselines=tuple(name for name in BASELINES if name != "flex"),
    ),
    # seconds on a CPU: the dry run of `make gpu`, and tests
    "rehearsal": Grid(
        attention=(("512/8", 600, SMALL, PASSES), ("sliding", 900, SMALL, ("forward",))),
        growth_heads=SMALL,
        growth=(400, 800, 1600),
        growth_baselines=800,
        compaction=(("64/4", 300, SMALL),),
        decoding=((10, 4, 2, SMALL),),
        models=(("tiny", 300, (1, 2)),),
        compressing=(("tiny", 600, 200, 400),),
        layouts=(("64/4", 300),),
        memory=((("attention", "64/4", 300, SMALL, "both", "cpu"), (OURS, "flex")),),
        queueing=(SMALL,),
        generating=(("tiny",),),
        training=(("tiny", "64/4", 150),),
        checks=(600, ((10, 4, 2),), SMALL),
        tiles=(40, ("fwd",)),
    ),
}


def quick(grid: Grid, most_rows: int = 4096, most_batch: int = 16) -> Grid:
    """What takes minutes of a grid, and the guard measures again: no compiling, and the slowest baselines left out."""
    return replace(
        grid,
        attention=tuple((*row, passes[-1:]) for *row, passes in grid.attention if row[1] <= most_rows),
        models=tuple((name, context, (min(most_batch, max(batches)),)) for name, context, batches in grid.models[:2]),
        compressing=tuple(row for row in grid.compressing if row[1] <= most_rows)[:1],
        layouts=tuple(row for row in grid.layouts if row[1] <= most_rows),
        baselines=tuple(name for name in grid.baselines if "flex" not in name),
    )
