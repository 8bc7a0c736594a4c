"""Tile configs, host arithmetic and the tuning file. No Triton kernel runs here."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from gistkern import autotune, backends
from gistkern.kernels import configs, device, schedule, tuned
from gistkern.kernels.chips import CHIPS

ARCHES = [chip.arch for chip in CHIPS]


@pytest.mark.parametrize("arch", [*ARCHES, "sm_103", "sm_121", "gfx950"])
def test_every_kernel_has_a_config(arch):
    for kernel, width, itemsize in itertools.product(configs.KERNELS, (16, 32, 64, 128, 256), (2, 4)):
        config = configs.pick(kernel, arch, width, itemsize)
        for size in (config.block_rows, config.block_cols):
            assert size >= 16
            assert size & (size - 1) == 0
        assert config.num_warps in (4, 8)
        assert config.why


def test_an_unlisted_chip_gets_tiles_that_fit_everywhere():
    smallest = configs.pick("fwd", "sm_86", 128, 2)
    assert configs.pick("fwd", "sm_87", 128, 2) == smallest
    assert configs.pick("fwd", "sm_121", 128, 2) == smallest


def test_padded_head_dimensions_have_tiles_of_their_own_where_needed():
    assert configs.pick("fwd", "sm_80", 128, 2, 96) != configs.pick("fwd", "sm_80", 128, 2, 128)
    assert configs.pick("fwd", "sm_90", 128, 2, 96) == configs.pick("fwd", "sm_90", 128, 2)


def test_overrides_end_with_their_block():
    mine = configs.Config(16, 16, 4, 1, "test")
    before = configs.pick("fwd", "sm_80", 64, 2)
    with configs.overridden(fwd=mine):
        assert configs.pick("fwd", "sm_80", 64, 2) is mine
        assert configs.pick("decode", "sm_80", 64, 2) is not mine
    assert configs.pick("fwd", "sm_80", 64, 2) == before
    with pytest.raises(ValueError, match="unknown kernel"), configs.overridden(forward=mine):
        pass


@pytest.mark.parametrize(
    ("head_dim", "width"), [(1, 16), (16, 16), (17, 32), (80, 128), (96, 128), (128, 128), (192, 256)]
)
def test_padded(head_dim, width):
    assert schedule.padded(head_dim) == width


@pytest.mark.parametrize(
    ("group", "rows", "pack"), [(1, 64, 1), (4, 64, 4), (3, 64, 3), (40, 16, 10), (17, 64, 1), (32, 64, 16)]
)
def test_packed_heads_divide_their_group(group, rows, pack):
    assert schedule.pack_heads(group, rows) == pack


def test_sections_fit_half_of_the_cache():
    assert schedule.section_heads(32, 1 << 20, 40 << 20) == 20
    assert schedule.section_heads(8, 1 << 20, 40 << 20) == 8
    assert schedule.section_heads(8, 1 << 30, 40 << 20) == 1


def test_chunks_fill_the_device_and_no_more():
    assert schedule.chunk_count(248, 32768, 132) == 5
    assert schedule.chunk_count(5000, 32768, 132) == 1
    assert schedule.chunk_count(8, 600, 132) == 2, "chunks of at least MIN_CHUNK_ROWS"
    assert schedule.chunk_count(8, 100, 132) == 1
    assert schedule.chunk_count(0, 100, 132) == 1


def test_splits_begin_above_512_columns():
    assert schedule.split_count(8, 512, 132) == 1
    assert schedule.split_count(8, 513, 132) == 3
    assert schedule.split_count(8, 100_000, 132) == 33
    assert schedule.split_count(1000, 100_000, 132) == 1


def test_offsets_are_wide_only_where_int32_is_too_short():
    narrow = torch.empty(1, 1, 2**10, 16, device="meta")
    far = torch.empty_strided((1, 1, 2**10, 16), (0, 0, 2**21, 1), device="meta")
    heads = torch.empty_strided((1, 9, 4, 16), (0, 2**28, 16, 1), device="meta")
    assert not device.wide_rows(narrow, narrow, narrow, narrow)
    assert device.wide_rows(far, narrow, narrow, narrow)
    assert device.wide_rows(narrow, narrow, narrow, far), "local and gist rows are numbered in one sequence"
    assert not device.wide_samples(narrow, narrow)
    assert device.wide_samples(narrow, heads)


def rows():
    base = {"width": 128, "itemsize": 2, "num_warps": 4, "num_stages": 1, "milliseconds": 0.5}
    return [{"kernel": "fwd", "block_rows": 32, "block_cols": 16, **base}]


def test_a_tuning_file_is_used_where_it_has_a_row(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "tuned.json"
    tuned.write(path, "some card", "sm_80", rows())
    monkeypatch.setenv(tuned.ENVIRONMENT, str(path))
    config = configs.pick("fwd", "sm_80", 128, 2)
    assert (config.block_rows, config.block_cols, config.num_warps, config.num_stages) == (32, 16, 4, 1)
    assert "measured" in config.why
    assert configs.pick("fwd", "sm_80", 64, 2).block_rows != 32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: {**c, "arch": "sm_90"}, r"holds \(format, arch, triton\) .*'sm_90'.*expected .*'sm_80'"),
        (lambda c: {**c, "triton": "3.0.0"}, "3.0.0"),
        (lambda c: {key: value for key, value in c.items() if key != "rows"}, "is no file of tuned configs"),
        (lambda c: {**c, "rows": [{**c["rows"][0], "num_warps": "4"}]}, "without whole numbers"),
        (lambda c: [], "is no file of tuned configs"),
    ],
)
def test_a_tuning_file_that_does_not_fit_is_an_error(tmp_path, damage, message):
    path = tmp_path / "tuned.json"
    tuned.write(path, "some card", "sm_80", rows())
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        tuned.read(path, "sm_80")


def test_a_torn_or_missing_tuning_file_is_an_error(tmp_path):
    path = tmp_path / "tuned.json"
    with pytest.raises(ValueError, match=r"run `python -m gistkern\.autotune"):
        tuned.read(path, "sm_80")
    tuned.write(path, "some card", "sm_80", rows())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="is no file of tuned configs"):
        tuned.read(path, "sm_80")


def test_tuning_keeps_the_fastest_candidate_that_fits():
    from triton.runtime.errors import OutOfResources

    asked = []

    def measure(kernel, width, dtype):
        config = configs.pick(kernel, "sm_80", width, dtype.itemsize)
        asked.append((kernel, config))
        if config.num_warps == 8:
            raise OutOfResources(300_000, 166_912, "shared memory")
        return 1000 / config.block_rows + config.num_stages

    found = autotune.tune(measure, "sm_80", widths=(64,))
    assert [row["kernel"] for row in found] == list(configs.KERNELS)
    forward = found[0]
    assert (forward["block_rows"], forward["num_warps"], forward["num_stages"]) == (256, 4, 2)
    assert forward["milliseconds"] == 1000 / 256 + 2
    assert asked[0] == ("fwd", configs.pick("fwd", "sm_80", 64, 2)), "the shipped config is measured first"


def test_tuning_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="torch finds none"):
        autotune.main(["--out", str(tmp_path / "x.json")])


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(1, 1, 1, 16), "serves CUDA and ROCm tensors, got cpu"),
        (torch.empty(1, 1, 1, 16, device="meta"), "serves CUDA and ROCm tensors, got meta"),
    ],
)
def test_the_triton_row_says_why_not(tensor, reason):
    assert backends.get("triton").reason(tensor) == reason


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(1, 1, 1, 16, dtype=torch.float64), "computes float16, bfloat16 and float32"),
        (torch.empty(1, 1, 1, 257), "head dimensions up to 256, got 257"),
        (torch.empty(1, 1, 1, 256), None),
    ],
)
def test_the_triton_row_refuses_what_it_has_no_kernel_for(tensor, reason, monkeypatch):
    monkeypatch.setenv("GISTKERN_EMULATED", "1")
    found = backends.get("triton").reason(tensor)
    assert found is None if reason is None else reason in found


def test_without_triton_the_row_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert "pip install 'gistkern[triton]'" in backends.get("triton").reason(torch.empty(1, 1, 1, 16))


def test_strings_of_meta_are_named_before_they_are_passed_on():
    """Triton 3.6, which is not installed here, cannot hand a string that is an attribute to another function."""
    sources = [path.read_text() for path in Path(device.__file__).parent.glob("*.py")]
    lines = [line.strip() for source in sources for line in source.splitlines() if "META.PRECISION" in line]
    assert len(lines) == 3
    assert all(line.startswith("PRECISION: tl.constexpr = META.PRECISION") for line in lines)
