"""Gist-masked attention against what a user would write without gistkern, checked equal first.

    make bench

Compare the medians of one group with each other; absolute times mean nothing across machines.
"""

import pytest

from bench.measured.attention import PASSES, attention_case
from bench.measured.baselines import BASELINES
from bench.measured.case import OURS
from bench.measured.memory import peak_bytes
from bench.shapes import LAYOUTS


@pytest.mark.parametrize("name", [OURS, *BASELINES])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(timed, device, rows, layout, passes, name):
    case = attention_case(layout, rows, "SmolLM2-135M", passes, device, [name] if name != OURS else [])
    timed(case, name, f"{passes}, {layout}, {rows} rows")


@pytest.mark.parametrize("name", [OURS, *BASELINES])
@pytest.mark.parametrize("passes", PASSES)
def test_memory(benchmark, device, rows, passes, name):
    """The peak is in the benchmark's extra information; its time is a process's and means nothing."""
    case = "attention", "512/8", rows, "SmolLM2-135M", passes, device
    benchmark.group = f"peak memory, {passes}, 512/8, {rows} rows"
    benchmark.extra_info["peak bytes"] = benchmark.pedantic(peak_bytes, (case, name), rounds=1)
