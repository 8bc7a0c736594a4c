"""Every case under pytest-benchmark, each call checked equal first: `make bench`.

Compare the medians of one group with each other; absolute times mean nothing across machines.
"""

import pytest
import torch

from bench.measured import compaction, decoding, layouts
from bench.measured.attention import PASSES, attention_case
from bench.measured.baselines import BASELINES
from bench.measured.case import OURS
from bench.measured.compaction import compaction_case
from bench.measured.decoding import decoding_case
from bench.measured.layouts import layout_case
from bench.measured.memory import peak_bytes
from bench.measured.models import FULL, PREFILL, compressing_case, model_decoding_case
from bench.measured.timing import finished
from bench.shapes import LAYOUTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the longest at which everything, FlexAttention's compiling aside, is seconds
ROWS = 16384 if DEVICE == "cuda" else 2048
MODEL = "SmolLM2-135M, 4 of 30 layers"
SIZES = [(10, 16, 1), (10, 16, 16), (10, 16, 256), (1024, 64, 16), (16384, 64, 1)]


@pytest.fixture
def timed(benchmark):
    def run(case, name, group):
        if name not in case.calls:
            pytest.skip(f"not measured: {case.not_measured[name]}")
        benchmark.group = group
        benchmark.pedantic(finished(case.calls[name], case.device), rounds=3, warmup_rounds=1)

    return run


def beside(name):
    """Ours alone, or it and one baseline."""
    return [name] if name != OURS else []


@pytest.mark.parametrize("name", [OURS, *BASELINES])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(timed, layout, passes, name):
    case = attention_case(layout, ROWS, "SmolLM2-135M", passes, DEVICE, beside(name))
    timed(case, name, f"{passes}, {layout}, {ROWS} rows")


@pytest.mark.parametrize("name", [OURS, *BASELINES])
@pytest.mark.parametrize("passes", PASSES)
def test_memory(benchmark, passes, name):
    """The peak is in the benchmark's extra information; its time is a process's and means nothing."""
    case = "attention", "512/8", ROWS, "SmolLM2-135M", passes, DEVICE
    benchmark.group = f"peak memory, {passes}, 512/8, {ROWS} rows"
    benchmark.extra_info["peak bytes"] = benchmark.pedantic(peak_bytes, (case, name), rounds=1)


@pytest.mark.parametrize("name", [OURS, *layouts.BASELINES])
@pytest.mark.parametrize("layout", ["64/4", "512/8"])
def test_layout(timed, layout, name):
    timed(layout_case(layout, ROWS, DEVICE, beside(name)), name, f"layout from ids, {layout}, {ROWS} rows")


@pytest.mark.parametrize("name", [OURS, *compaction.BASELINES])
@pytest.mark.parametrize("layout", ["64/4", "512/8"])
def test_compaction(timed, layout, name):
    timed(compaction_case(layout, ROWS, "Llama-3-8B", DEVICE), name, f"compaction, {layout}, {ROWS} rows")


@pytest.mark.parametrize("name", [OURS, "compress, one segment", PREFILL])
def test_compress(timed, name):
    timed(compressing_case(MODEL, 2048, DEVICE), name, "reading 2,048 tokens")


@pytest.mark.parametrize("name", [OURS, *decoding.BASELINES])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}+{} rows, batch {}".format(*size))
def test_decoding(timed, size, name):
    case = decoding_case(*size, "Llama-3-8B", DEVICE, beside(name))
    timed(case, name, "decoding, {}+{} rows, batch {}".format(*size))


@pytest.mark.parametrize("name", [OURS, FULL])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("context", [64, 4096])
def test_model(timed, context, batch, name):
    case = model_decoding_case(MODEL, context, batch, DEVICE)
    timed(case, name, f"a model's step after {context} tokens, batch {batch}")
