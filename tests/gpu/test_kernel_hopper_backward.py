"""Hopper's backward: gradients within the budget for every variant, and no wait, arrival or fence to spare."""

import re

import pytest
import torch
from emulation import INTERPRETED, SANITIZED

if INTERPRETED:
    pytest.skip("the interpreter runs no Gluon", allow_module_level=True)
if SANITIZED:
    from asynchrony import dropped, plants

from bench.counted.hopper_backward import columns_of_rows, rows_of_columns
from gistkern import GistLayout, gist_attention
from gistkern.backends import hopper_backward, triton, triton_plan
from gistkern.backends.hopper import MappedSteps, reason_against
from gistkern.backends.hopper_backward import HopperBackward
from gistkern.kernels.arguments import AttentionArguments
from gistkern.kernels.device import facts_of
from gistkern.kernels.hopper import bwd_work
from gistkern.rows import gather_rows
from gistkern.testing import compare, make_inputs

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def on_hopper():
    if not SANITIZED and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Two multiprocessors, so that a program walks several tiles."""
    facts = facts_of(torch.device("cuda", 0))
    small = type(facts)(facts.arch, 2, facts.l2_bytes, facts.name)
    monkeypatch.setattr(hopper_backward, "facts_of", lambda device: small)


@pytest.fixture
def backward_alone(monkeypatch):
    """The plain forward, and this backward or a failure."""

    def wanted(direction, *tensors):
        assert reason_against(*tensors) is None
        return direction == "bwd"

    monkeypatch.setattr(triton_plan, "wanted", wanted)
    monkeypatch.setattr(triton_plan, "_known", {})


LAYOUTS = {
    "T=1": lambda: GistLayout.from_segments([], 1, tail=1),
    "T=71-one-segment": lambda: GistLayout.from_segments([], 1, tail=71, sink_tokens=0),
    "T=70-wide-gists": lambda: GistLayout.from_segments([7, 5], 25, tail=8),
    "T=66-hierarchical": lambda: GistLayout.hierarchical([11] * 4, 3, 5, tail=5),
    "T=60-sliding": lambda: GistLayout.sliding(60, 21, 8, gists=2),
    "packed": lambda: GistLayout.pack([GistLayout.from_segments([n, 9], 2, tail=3) for n in (11, 30, 1)]),
    "left-padded": lambda: GistLayout.stack([GistLayout.from_segments([n], 2, tail=5) for n in (40, 3)], "left"),
    "right-padded": lambda: GistLayout.stack([GistLayout.from_segments([n], 2, tail=5) for n in (40, 3)], "right"),
    "ragged-past": lambda: GistLayout.from_input_ids(
        torch.tensor([[1, 2, 90, 3] * 6] * 2), [90], past=torch.tensor([0, 17])
    ),
    "past-rows-and-tail": lambda: GistLayout.from_segments([30, 30], 4, tail=20).last_rows(33),
    "windowed": lambda: GistLayout.from_segments([20, 17, 13], 3, tail=4).windowed(9),
}


COUNTED = ["T=70-wide-gists", "T=66-hierarchical", "T=60-sliding", "past-rows-and-tail", "windowed"]


@pytest.mark.parametrize("name", COUNTED)
def test_tiles_visit_what_the_work_counter_says(name, device):
    layout, positions = LAYOUTS[name](), 16
    rows, local, gists = layout.num_rows, layout.num_local, layout.num_compact
    tiles = -(-rows // positions), -(-local // 128), -(-gists // 128)
    table = torch.full((sum(tiles), bwd_work.FIELDS), torch.nan, device=device)
    rule = tuple(vector.to(device) for vector in (layout.gist_begin, layout.gist_end, layout.local_begin))
    meta = bwd_work.WorkMeta(positions, positions)
    bwd_work.sm90_gist_attn_bwd_work_kernel[(sum(tiles),)](table, rule, rows, local, gists, *tiles, META=meta)
    of_rows, *of_columns = table.cpu().view(torch.int32).split(tiles)
    assert of_rows[:, 4].tolist() == columns_of_rows(layout, positions).tolist()
    for found, gist in zip(of_columns, (False, True), strict=True):
        halves = found[:, [2, 3, 6, 7]].reshape(-1, 2, 2)
        assert torch.equal(halves.long(), torch.from_numpy(rows_of_columns(layout, gist)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_scheme(name, device, backward_alone):
    layout = LAYOUTS[name]().to(device)
    compare(make_inputs(layout, heads=8, kv_heads=2, head_dim=64, dtype=BF16), layout, "triton")


def test_rows_that_see_nothing_get_zeros_and_two_runs_are_bit_identical(device, backward_alone):
    layout = GistLayout.stack([GistLayout.from_segments([n], 2, tail=5) for n in (40, 3)], "left").to(device)
    inputs = make_inputs(layout, heads=4, kv_heads=1, head_dim=64, dtype=BF16)
    leaves = inputs.q, inputs.k, inputs.v
    runs = [
        torch.autograd.grad(gist_attention(*leaves, layout, backend="triton"), leaves, inputs.grad_out)
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert all((gradient[1, :, : 47 - 10] == 0).all() and gradient[1, :, 47 - 10 :].any() for gradient in runs[0])


# several tiles of rows and of local columns; the compact columns' second half holds a few
LONG = {"long": lambda: GistLayout.from_segments([100, 70, 60], 24, tail=40)}
VARIANTS = [(64, FP16, 4, 1), (128, BF16, 4, 1), (128, FP16, 2, 2), (128, BF16, 6, 1), (64, BF16, 16, 1)]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant(variant, device, backward_alone):
    """Head dimensions and types, and 4, 1, 2 and 8 heads packed."""
    head_dim, dtype, heads, kv_heads = variant
    layout = LONG["long"]().to(device)
    compare(make_inputs(layout, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype), layout, "triton")


def test_after_hoppers_forward(device, monkeypatch):
    monkeypatch.setenv("GISTKERN_HOPPER", "always")
    monkeypatch.setattr(triton_plan, "_known", {})
    layout = GistLayout.from_segments([20, 17], 3, tail=9, past=5).to(device)
    compare(make_inputs(layout, heads=4, kv_heads=1, head_dim=64, dtype=BF16), layout, "triton")


@pytest.mark.parametrize("gists", [3, 0])
def test_the_operator_takes_them_where_they_are_asked_for(gists, device, monkeypatch):
    layout = GistLayout.from_segments([30] if gists else [], max(gists, 1), tail=20, sink_tokens=0).to(device)
    inputs = make_inputs(layout, heads=4, kv_heads=1, head_dim=64, dtype=BF16)
    q, k, v = (leaf.detach() for leaf in inputs.leaves().values())
    rows = [gather_rows(t, layout.gather) for t in (k, v)]
    arguments = AttentionArguments(q, k, v, *rows, layout.gist_begin, layout.gist_end, layout.local_begin, 0.125)
    out, lse = triton.forward(arguments)
    found, served, steps = {}, [], HopperBackward.steps
    monkeypatch.setattr(HopperBackward, "steps", lambda *given: served.append(choice) or steps(*given))
    for choice in ("always", "never"):
        monkeypatch.setenv("GISTKERN_HOPPER", choice)
        found[choice] = triton.backward(arguments, inputs.grad_out, out, lse)
    for ours, plain in zip(*found.values(), strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    assert served == ["always"]


def uneven(device):
    """A backward whose tiles visit unlike numbers of stages, so that a wrong stage or phase shows wherever it is."""

    def of_tiles(*values):
        return torch.tensor(values, dtype=torch.int32, device=device).repeat_interleave(32)[None]

    begin = of_tiles(0, 0, 0, 300, 300, 300, 300, 600, 600, 600)
    end = of_tiles(0, 300, 300, 300, 310, 600, 600, 600, 600, 640)
    start = of_tiles(0, 16, 40, 48, 80, 80, 80, 160, 160, 160)
    gather = torch.full((1, 640), -1, device=device)
    generator = torch.Generator().manual_seed(0)

    def draw(heads, rows):
        return torch.randn(1, heads, rows, 64, generator=generator).to(device, BF16)

    given = draw(4, 320), draw(4, 320), draw(1, 320), draw(1, 320), draw(1, 640), draw(1, 640)
    out, lse = draw(4, 320), torch.full((1, 4, 320), 6.0, device=device)  # no forward's: any will do
    made = HopperBackward(AttentionArguments(*given[1:], begin, end, start, 0.125), 0)
    steps = MappedSteps(device, (begin, end, start, gather), made.work, made.buffers)
    results = [torch.full_like(given[i], torch.nan) for i in (1, 2, 3)]
    work = steps.workspace(device)
    arguments = steps.arguments((*given, out, lse, *results, *results[1:]), work)
    written = {DQ: [results[0], arguments[18]], GIST: arguments[19:], LOCAL: results[1:]}
    return made.launches, made.buffers(*arguments), written


WORK, DQ, GIST, LOCAL, FOLD = range(5)
CAUGHT = "deadlock|has not waited|may still read|writes|without a fence|ends before"


@pytest.mark.skipif(not SANITIZED, reason="on a GPU most of these go well most of the time")
@pytest.mark.parametrize("kernel", [DQ, GIST, LOCAL], ids=["dq", "gist", "local"])
def test_every_mistake_shows(kernel, device, monkeypatch):
    """Each wait, arrival, fence and wait for products and stores left out once: a fault, or another result."""
    monkeypatch.setattr(hopper_backward, "chunk_count", lambda *sizes: 2)
    device = torch.device(device)
    launches, buffers, written = uneven(device)

    def run(number):
        for tensor in written[number]:
            tensor.fill_(torch.nan)
        launches[number](device, *buffers[number])
        return [tensor.clone() for tensor in written[number]]

    launches[WORK](device, *buffers[WORK])
    if kernel != DQ:
        run(DQ)
    right = run(kernel)
    assert all(tensor.isfinite().all() for tensor in right)
    unnoticed, planted = [], plants()
    for kind, number in planted:
        with dropped(kind, number):
            try:
                found = run(kernel)
            except Exception as fault:
                noticed = re.search(CAUGHT, str(fault)) is not None
            else:
                noticed = not all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
        if not noticed:
            unnoticed.append((kind, number))
    assert not unnoticed
    assert planted
