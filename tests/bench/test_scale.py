"""The arithmetic of many GPUs: bytes, pairs and shares as counted by hand."""

from pathlib import Path

import pytest

from bench.calculated import scale
from gistkern import GistLayout
from gistkern.kernels.chips import gpu_named

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def case():
    return scale.calculated(GistLayout.from_segments([96] * 64, 4, sink_tokens=0), "96/4", 4)


def test_a_layer_has_the_weights_of_the_published_model():
    # q, o; k, v; gate, up, down
    assert scale.layer_weights() == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336


def test_bytes_are_those_of_rows_of_all_other_ranks(case):
    row = 2 * 8 * 128 * 2
    assert case["gist rows"] == 64 * 4
    assert case["ring, MB"] == 6400 // 4 * 3 * row / 1e6
    sent = round(case["padding"] * 256)
    assert sent >= 256
    assert case["received, MB"] == sent // 4 * 3 * row / 1e6
    assert case["link"] == "NVLink"
    assert case["receiving, ms"] == pytest.approx(1e9 * case["received, MB"] / (450 * 10**9))


def test_time_is_the_work_of_the_heaviest_shard(case):
    pairs = sum(100 * 101 // 2 + 100 * 4 * segment for segment in range(64))
    per_pair, per_row = 4 * 128 * 32, 2 * scale.layer_weights()
    whole = 1e3 * (pairs * per_pair + 6400 * per_row) / gpu_named(scale.GPU).flops
    assert case["products, ms"] * case["balance"] == pytest.approx(whole / 4)
    assert 0.95 < case["balance"] <= 1
    full = 1e3 * (6400 * 6401 // 2 * per_pair + 6400 * per_row) / gpu_named(scale.GPU).flops
    assert case["full attention, ms"] == pytest.approx(full / 4)
    # its own rows and every compact row
    assert case["kept K/V, MB"] == pytest.approx((1600 + 256) * 2 * 8 * 128 * 2 / 1e6, rel=0.1)


def test_the_page_shows_what_was_calculated(case):
    line = scale.tables([case])["cases"].splitlines()[-1]
    assert line.startswith("| 96/4 | 6,400 | 4 | 256 | 0.786 |")
    committed = (DOCS / "internals" / "scale.md").read_text()
    assert "Calculated, not measured" in committed
    assert committed.count("\n| ") == 2 + len(scale.CASES) * len(scale.SCHEMES)
