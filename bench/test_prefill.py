"""What happens before decoding: the layout, compaction, and compress() beside a plain prefill."""

import pytest

from bench.measured import compaction, layouts
from bench.measured.case import OURS
from bench.measured.compaction import compaction_case
from bench.measured.layouts import layout_case
from bench.measured.models import compressing_case


@pytest.mark.parametrize("name", [OURS, *layouts.BASELINES])
@pytest.mark.parametrize("layout", ["64/4", "512/8"])
def test_layout(timed, device, rows, layout, name):
    case = layout_case(layout, rows, device, [name] if name != OURS else [])
    timed(case, name, f"layout from ids, {layout}, {rows} rows")


@pytest.mark.parametrize("name", [OURS, *compaction.BASELINES])
@pytest.mark.parametrize("layout", ["64/4", "512/8"])
def test_compaction(timed, device, rows, layout, name):
    timed(compaction_case(layout, rows, "Llama-3-8B", device), name, f"compaction, {layout}, {rows} rows")


@pytest.mark.parametrize("name", [OURS, "compress, one segment", "plain prefill"])
def test_compress(timed, device, name):
    case = compressing_case("SmolLM2-135M, 4 of 30 layers", 2048, device)
    timed(case, name, "reading 2,048 tokens")
