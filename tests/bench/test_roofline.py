"""The roofline page: counts against hand-made ones, limits from both sides, and the page against its generator."""

from math import ceil
from pathlib import Path

import pytest
import torch

from bench.calculated import roofline, serving
from bench.counted.work import Shape, least_bytes, visible_pairs
from bench.fill import filled
from gistkern import GistLayout, gist_attention
from gistkern.kernels.chips import GPUS, Gpu, chip_named, gpu_named
from gistkern.rows import gather_rows
from gistkern.testing import make_inputs

DOCS = Path(__file__).parents[2] / "docs"
H100, RTX_4090 = gpu_named("H100 SXM 80 GB"), gpu_named("RTX 4090 24 GB")
# Llama-3-8B: elements of its matrices, added up by hand
LINEARS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
VOCABULARY, NORMS = 128256 * 4096, 65 * 4096
ROW = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, head dimension, bf16


@pytest.fixture(scope="module")
def tables():
    return roofline.tables()


# multiprocessors, FLOPs per cycle of each (dense bf16, fp32 accumulation), boost clock; twice that would be sparsity,
# and on a GeForce also accumulation in fp16
@pytest.mark.parametrize(
    ("name", "cycle"),
    [
        ("H100 SXM 80 GB", 132 * 4096 * 1.83e9),
        ("A100 SXM 80 GB", 108 * 2048 * 1.41e9),
        ("RTX 4090 24 GB", 128 * 512 * 2.52e9),
        ("L40S 48 GB", 142 * 1024 * 2.52e9),
    ],
)
def test_peaks_are_dense_and_accumulate_in_fp32(name, cycle):
    gpu = gpu_named(name)
    assert gpu.flops == pytest.approx(cycle, rel=0.02)
    assert chip_named(gpu.arch).multiprocessors in (gpu.multiprocessors, 128)


def test_perfect_time_is_the_longer_of_two():
    gpu = Gpu("test", "sm_90", 1, flops=1000, bandwidth=10, memory=1, source="")
    assert gpu.ridge == 100
    assert roofline.perfect_time(gpu, 2000, 19) == (2.0, "compute")
    assert roofline.perfect_time(gpu, 2000, 21) == (2.1, "memory")


def test_bytes_of_a_tiny_layout_by_hand():
    layout = GistLayout.from_segments([5, 4], 2, tail=3)
    assert (layout.num_rows, layout.num_local, layout.num_compact) == (16, 16, 5)  # sink and four gists
    q, k, compact = 16 * 4 * 8 * 2, 16 * 2 * 8 * 2, 5 * 2 * 8 * 2
    moved = least_bytes(layout, Shape(4, 2, 8))
    assert moved == {"q": q, "k": k, "v": k, "gist_k": compact, "gist_v": compact, "out": q, "lse": 16 * 4 * 4}
    backward = least_bytes(layout, Shape(4, 2, 8), backward=True)
    assert sum(backward.values()) == (1024 + 512 * 2 + 160 * 2) * 2 + 1024 * 2 + 256


def test_bytes_are_those_of_the_op_s_tensors():
    layout = GistLayout.from_segments([20, 20], 4, tail=20, past=9).last_rows(33)
    inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=16)
    past_key, past_value = inputs.past_key, inputs.past_value
    out, lse = gist_attention(
        inputs.q, inputs.k, inputs.v, layout, past_key=past_key, past_value=past_value, return_lse=True
    )
    assert past_key is not None
    gist_k = torch.cat([past_key, gather_rows(inputs.k, layout.gather)], 2)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "gist_k": gist_k, "gist_v": gist_k, "out": out, "lse": lse}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shape = Shape(4, 2, 16, itemsize=4)
    assert least_bytes(layout, shape) == sizes
    grads = {"dout": inputs.grad_out.nbytes} | {f"d{name}": sizes[name] for name in ("q", "k", "v", "gist_k", "gist_v")}
    assert least_bytes(layout, shape, backward=True) == sizes | grads


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_of_the_dense_mask(backward):
    layout = GistLayout.hierarchical([11] * 4, 3, 5, tail=20)
    seen = layout.dense().sum().item()
    per_pair = 10 if backward else 4
    assert roofline.flops_of(visible_pairs(layout), Shape(6, 3, 32), backward) == per_pair * 32 * 6 * seen


def test_op_by_hand():
    """Plain causal attention of 4,096 rows."""
    row = roofline.op("one segment", 4096)
    pairs = 4096 * 4097 // 2
    assert row["visible_pairs"] == pairs
    assert row["share_of_causal"] == 1.0
    assert row["forward"]["flops"] == 4 * 128 * 32 * pairs
    assert row["backward"]["flops"] == 2.5 * row["forward"]["flops"]
    assert row["forward"]["bound"] == "compute"
    assert row["forward"]["seconds"] == pytest.approx(4 * 128 * 32 * pairs / 989.4e12)
    assert row["forward"]["causal_seconds"] == pytest.approx(row["forward"]["seconds"])


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_op_times_are_limits(gpu):
    """Tiles hold all visible pairs; the backward's schedule multiplies seven times, not five."""
    for name in roofline.COUNTED:
        row = roofline.op(name, 4096, gpu)
        forward, backward = row["forward"], row["backward"]
        assert forward["tile_flops"] > forward["flops"]
        assert backward["tile_flops"] > 1.4 * backward["flops"]
        for time in (forward, backward):
            assert time["seconds"] == max(time["flops"] / gpu.flops, time["bytes"] / gpu.bandwidth)
            assert time["seconds"] <= time["tile_seconds"]
            assert time["seconds"] <= time["causal_seconds"] * 1.02  # gist rows are bytes that causal lacks


def test_decoding_by_hand():
    """What the page says about one layer's attention of a decoding step, of one sequence."""
    page = (DOCS / "internals" / "roofline.md").read_text()
    moved = []
    for gists, raw in ((10, 32), (0, 6128)):
        layout = GistLayout.decode(gists, raw - 1)
        flops, moved_ = roofline.flops_of(visible_pairs(layout), roofline.SHAPE), least_bytes(layout, roofline.SHAPE)
        moved.append(sum(moved_.values()))
        assert moved[-1] == 2 * 32 * 128 * 2 + 32 * 4 + (gists + raw) * 2 * 8 * 128 * 2
        assert flops == (gists + raw) * 4 * 128 * 32
        assert all(roofline.perfect_time(gpu, flops, moved[-1])[1] == "memory" for gpu in GPUS)
        assert f"{moved[-1]:,} bytes" in " ".join(page.split())
    assert f"{1e6 * moved[0] / H100.bandwidth:.3f} microseconds" in " ".join(page.split())
    assert f"1/{moved[1] / moved[0]:.0f} of the bytes" in page


def test_weights_by_hand():
    assert serving.parameters() == LINEARS + 2 * VOCABULARY + NORMS == 8_030_261_248
    assert serving.multiplied() == LINEARS + VOCABULARY + NORMS
    assert serving.kv_row() == ROW == 131072
    assert serving.weights_of("bf16") == serving.Weights(2 * 8_030_261_248, 2 * (LINEARS + VOCABULARY + NORMS))
    # 4 bits, a byte per 64, 4 bytes per 64 x 256; code tables of 64 and 1,024 bytes and an offset per matrix
    nf4 = LINEARS // 2 + LINEARS // 64 + 4 * LINEARS // 16384 + 32 * 7 * (64 + 1024 + 4)
    for rest, kind in ((2, "NF4, rest bf16"), (4, "NF4, rest fp32")):
        resident = nf4 + rest * (2 * VOCABULARY + NORMS)
        assert serving.weights_of(kind) == serving.Weights(resident, resident - rest * VOCABULARY)
    # the page on training's memory counts the originals of ten gist rows besides
    assert f"{resident + 10 * 4096 * 4:,}" in (DOCS / "internals" / "training-memory.md").read_text()
    with pytest.raises(ValueError, match="expected one of bf16"):
        serving.weights_of("int8")


@pytest.mark.parametrize(
    ("kind", "percent"),
    [("bf16", 4.7), ("NF4, rest bf16", 12.3), ("NF4, rest fp32", 9.3)],
    ids=lambda value: str(value),
)
def test_about_12_percent(kind, percent):
    cache = 6096 * 131072
    share = cache / (cache + serving.weights_of(kind).resident)
    assert round(100 * share, 1) == percent
    assert serving.kv_share_of_memory(kind, 6096) == pytest.approx(share)


def test_crossover_in_bytes():
    """batch x rows is what counts."""
    read = 2 * (LINEARS + VOCABULARY + NORMS)
    rows = read // ROW + 1
    assert (
        f"| bf16 | 16,060,522,496 | {read:,} | 4.7% | 5.1% | {rows:,} |"
        in (DOCS / "internals" / "roofline.md").read_text()
    )
    share = serving.kv_share("bf16", 16, 6128)
    assert share == pytest.approx(16 * 6128 * ROW / (read + 16 * 6128 * ROW))
    assert share < 0.5 < serving.kv_share("bf16", 64, 6128)
    assert 16 * 6128 < rows < 64 * 6128


def test_documents_by_independent_arithmetic():
    left = 80e9 - 1e9 - 2 * 8_030_261_248
    rows = (6096, 10, 128, ceil(6096 / 512) * 8, 131072, 131072 // 512 * 8)
    assert tuple(serving.DOCUMENTS.values()) == rows
    fits = [serving.largest_batch(H100, "bf16", count) for count in rows]
    assert fits == [int(left / (count * 131072)) for count in rows] == [78, 48019, 3751, 5001, 3, 234]
    assert serving.largest_batch(RTX_4090, "bf16", 131072) == 0
    for gpu in GPUS:
        for kind in serving.WEIGHTS:
            free = gpu.memory - serving.RESERVE - serving.weights_of(kind).resident
            for count in rows:
                fit = serving.largest_batch(gpu, kind, count)
                assert fit * count * ROW <= free < (fit + 1) * count * ROW


def test_rows_of_segments_are_those_of_the_layout():
    """As compress() cuts a document: the last segment may be shorter and has its gists all the same."""
    lengths = [512] * (6096 // 512) + [6096 % 512]
    layout = GistLayout.from_segments(lengths, 8, sink_tokens=0).closed()
    assert serving.DOCUMENTS["6,096 in 512/8"] == int((layout.keep_end - layout.keep_begin).item()) == 96


def test_tokens_per_second_by_hand():
    read, moved = 2 * (LINEARS + VOCABULARY + NORMS), 64 * 6128 * ROW
    assert serving.tokens_per_second(H100, "bf16", 64, 6128) == pytest.approx(64 / ((read + moved) / 3.35e12))
    # 42 rows and many sequences: the tensor cores bound it, and another sequence adds nothing
    flops = 2 * (LINEARS + VOCABULARY + NORMS) + 4 * 128 * 32 * 32 * 42
    assert serving.tokens_per_second(H100, "bf16", 10_000, 42) == pytest.approx(989.4e12 / flops)
    assert serving.largest_batch(RTX_4090, "bf16", 131104) == 0


def test_only_batches_that_fit_have_a_limit(tables):
    for line in tables["limits"].splitlines()[2:]:
        name, rows, *cells = line.strip("| ").split(" | ")
        most = serving.largest_batch(gpu_named(name), "bf16", int(rows.replace(",", "")))
        assert [cell == "-" for cell in cells[:3]] == [batch > most for batch in (1, 16, 64)]
        rates = [float(cell.replace(",", "")) for cell in cells[:3] if cell != "-"]
        assert rates == sorted(rates)


def test_committed_tables_are_those_of_the_formulas(tables):
    page = (DOCS / "internals" / "roofline.md").read_text()
    assert filled(page, tables) == page, "run make roofline"
    # what the prose says
    longest = [roofline.op(name, 131072)["forward"] for name in ("512/8", "256/16", "1024/128")]
    assert [f"{row['causal_seconds'] / row['seconds']:.1f}" for row in longest] == ["51.8", "16.4", "8.4"]
    one = [serving.tokens_per_second(H100, "bf16", 1, rows) for rows in serving.rows_seen()[:2]]
    assert f"{one[0] / one[1]:.2f}" == "1.05"
