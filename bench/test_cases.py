"""Every case under pytest-benchmark, each call checked equal first: `make bench`.

Compare the medians of one group with each other; absolute times mean nothing across machines.
"""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from bench.measured import decoding, layouts
from bench.measured.attention import PASSES
from bench.measured.baselines import BASELINES
from bench.measured.case import FULL, OURS, PREFILL
from bench.measured.grid import GRIDS, LLAMA, SMOLLM2
from bench.measured.memory import peak_bytes
from bench.measured.sections import BESIDE
from bench.measured.timing import finished
from bench.shapes import LAYOUTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the longest at which everything, FlexAttention's compiling aside, is seconds
ROWS = 16384 if DEVICE == "cuda" else 2048
MODEL = "SmolLM2-135M, 4 of 30 layers"
GRID = replace(
    GRIDS[DEVICE],
    attention=tuple((layout, ROWS, SMOLLM2, PASSES) for layout in LAYOUTS),
    compaction=tuple((layout, ROWS, LLAMA) for layout in ("64/4", "512/8")),
    models=((MODEL, 64, (1, 16)), (MODEL, 4096, (1, 16))),
    compressing=((MODEL, 2048, 512, 512),),
    layouts=(("64/4", ROWS), ("512/8", ROWS)),
)
NAMES = {
    "attention": BASELINES,
    "compaction": decoding.COMPACTION,
    "decoding": decoding.BASELINES,
    "models": (FULL,),
    "compressing": ("compress, one segment", PREFILL),
    "layouts": layouts.BASELINES,
}
CASES = [
    (section, place, name)
    for section in NAMES
    for place in BESIDE[section].places(GRID)
    for name in (OURS, *NAMES[section])
]


@lru_cache(maxsize=1)
def case_of(section, place):
    return BESIDE[section].make(*place, DEVICE, GRID)


@pytest.mark.parametrize(("section", "place", "name"), CASES, ids=str)
def test_case(benchmark, section, place, name):
    case = case_of(section, place)
    if name not in case.calls:
        pytest.skip(f"not measured: {case.not_measured[name]}")
    benchmark.group, benchmark.name = f"{section}: {', '.join(map(str, place))}", name
    benchmark.pedantic(finished(case.calls[name], DEVICE), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("name", [OURS, *BASELINES])
@pytest.mark.parametrize("passes", PASSES)
def test_memory(benchmark, passes, name):
    """The peak is in the benchmark's extra information; its time is a process's and means nothing."""
    case = "attention", "512/8", ROWS, SMOLLM2, passes, DEVICE
    benchmark.group, benchmark.name = f"peak memory, {passes}, 512/8, {ROWS} rows", name
    benchmark.extra_info["peak bytes"] = benchmark.pedantic(peak_bytes, (case, name), rounds=1)
