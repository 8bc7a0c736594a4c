"""Hopper's forward against the fp64 oracle, within the error budgets of docs/concepts/numerics.md; on ttsem or Hopper.

Under ttsem with what tests/gpu/asynchrony.py adds: copies, products and stores land late.
"""

import numpy as np
import pytest
import torch
from emulation import INTERPRETED, SANITIZED

if INTERPRETED:
    pytest.skip("the interpreter runs no Gluon", allow_module_level=True)

from bench.counted.hopper import walks
from bench.gpu import hopper as picker
from bench.variants import Variant
from gistkern import GistLayout, gist_attention
from gistkern.backends import hopper, reference
from gistkern.kernels import configs
from gistkern.kernels import device as device_facts
from gistkern.kernels.hopper import fwd_work
from gistkern.testing import FORWARD_FACTOR, assert_within_budget, make_inputs

if SANITIZED:
    from asynchrony import dropped, plants

SMALL = configs.HopperConfig(64, 2, True, "test")
SHIPPED = dict(configs.HOPPER)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    if not SANITIZED and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper")
    monkeypatch.setenv(hopper.ENVIRONMENT, "always")
    # few programs, so that each walks several tiles of rows
    facts = device_facts.DeviceFacts("sm_90", 3, 1 << 20, "test")
    monkeypatch.setattr(hopper, "facts_of", lambda device: facts)
    for key in configs.HOPPER:
        monkeypatch.setitem(configs.HOPPER, key, SMALL)


def check(layout, device, heads=(4, 1), head_dim=64, dtype=torch.bfloat16, seed=0):
    layout = layout.to(device)
    inputs = make_inputs(layout, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype, seed=seed)
    past = None if inputs.past_key is None else (inputs.past_key, inputs.past_value)
    with torch.no_grad():
        given = {"past_key": inputs.past_key, "past_value": inputs.past_value, "backend": "triton"}
        ours = gist_attention(inputs.q, inputs.k, inputs.v, layout, return_lse=True, **given)
        plain = reference.from_layout(inputs.q, inputs.k, inputs.v, layout, past=past)
        exact = inputs.cast(torch.float64)
        past = None if exact.past_key is None else (exact.past_key, exact.past_value)
        exact = reference.from_layout(exact.q, exact.k, exact.v, layout, past=past)
    largest = exact[1][exact[1].isfinite()].abs().max().item() + head_dim**0.5
    for name, one, truth, half, size in zip(("out", "lse"), ours, exact, plain, (0.0, largest), strict=True):
        assert_within_budget(name, one, truth, half, FORWARD_FACTOR, size)


# tiles of 64 columns, and tiles of rows with 32 positions of 4 heads
LAYOUTS = {
    "one-segment": lambda: GistLayout.from_segments([], 1, tail=99, sink_tokens=0),
    "segments": lambda: GistLayout.from_segments([70, 40, 33], 5, tail=40),
    "wide-gists": lambda: GistLayout.from_segments([60, 50], 45, tail=30),
    "gap": lambda: GistLayout.from_segments([20, 20, 150], 40, tail=70),
    "hierarchical": lambda: GistLayout.hierarchical([40] * 3, 3, 5, tail=25),
    "sliding": lambda: GistLayout.sliding(120, 40, 16, gists=2),
    "packed": lambda: GistLayout.pack([GistLayout.from_segments([n, 9], 2, tail=3) for n in (70, 1, 30)]),
    "left-padded": lambda: GistLayout.stack([GistLayout.from_segments([n], 2, tail=5) for n in (80, 3)], "left"),
    "right-padded": lambda: GistLayout.stack([GistLayout.from_segments([n], 2, tail=5) for n in (80, 3)], "right"),
    "past": lambda: GistLayout.from_segments([50, 20], 3, tail=16, past=39),
    "past-rows-and-tail": lambda: GistLayout.from_segments([90, 60], 4, tail=20).last_rows(75),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_scheme(name, device):
    check(LAYOUTS[name](), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_ships(head_dim, dtype, device, monkeypatch):
    """Tiles of 128 columns, whose last one is cut to 32, 64 or 96."""
    monkeypatch.setitem(configs.HOPPER, ("fwd", head_dim), SHIPPED["fwd", head_dim])
    check(GistLayout.from_segments([40, 130, 60], 7, tail=50), device, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1), (12, 2), (8, 1)], ids=str)
def test_head_groups(heads, device):
    """Of 1, 2, 3 (one head a tile), 6 (two) and 8; two samples, heads in sections."""
    layout = GistLayout.stack([GistLayout.from_segments([60, 30], 3, tail=2), GistLayout.from_segments([90], 2)])
    check(layout, device, heads)


def test_rows_that_see_nothing_are_zero(device):
    ids = torch.tensor([[1, 2, 90, 3] * 18, [0] * 72], device=device)
    mask = (ids > 0).long()
    mask[0, 30:] = 0
    layout = GistLayout.from_input_ids(ids, [90], mask)
    inputs = make_inputs(layout, head_dim=64, dtype=torch.bfloat16)
    with torch.no_grad():
        out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, return_lse=True, backend="triton")
    padding = mask == 0
    assert (out.transpose(1, 2)[padding] == 0).all()
    assert (lse.transpose(1, 2)[padding] == -torch.inf).all()
    assert lse.transpose(1, 2)[~padding].isfinite().all()


def test_rows_may_lie_apart(device):
    """[B, N, H, D] storage viewed as [B, H, N, D], rows of keys with a gap behind them; two runs are bit-identical."""
    layout = GistLayout.from_segments([40, 30], 3, tail=9).to(device)
    inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    q = inputs.q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((*inputs.k.shape[:3], 80), torch.nan, dtype=torch.bfloat16, device=device)
    wide[..., :64] = inputs.k.detach()
    calls = [(inputs.q, inputs.k), (q, wide[..., :64]), (q, wide[..., :64])]
    with torch.no_grad():
        outs = [gist_attention(*call, inputs.v, layout, backend="triton") for call in calls]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2])


def test_what_no_row_sees_cannot_reach_the_output(device):
    layout = GistLayout.from_segments([70], 4, tail=40).to(device)
    inputs = make_inputs(layout, heads=4, kv_heads=1, head_dim=64, dtype=torch.bfloat16)
    kept, outs = layout.gather[0], []
    for factor in (1.0, -1e4):
        k, v = (t.detach().clone() for t in (inputs.k, inputs.v))
        for tensor in (k, v):
            rows = tensor[:, :, kept].clone()
            tensor[:, :, :70] *= factor
            tensor[:, :, kept] = rows
        with torch.no_grad():
            outs.append(gist_attention(inputs.q, k, v, layout, backend="triton"))
    assert torch.equal(outs[0][:, :, 74:], outs[1][:, :, 74:])
    assert not torch.equal(outs[0][:, :, 10], outs[1][:, :, 10]), "the context's own rows do see it"


@pytest.mark.slow
@pytest.mark.skipif(not SANITIZED, reason="on a GPU most of these go well most of the time")
def test_every_mistake_shows(device, monkeypatch):
    """Each wait, arrival, expectation and fence left out once, in every partition.

    The layout is small, but either half of a tile of rows hands back tiles of columns before, between and after those
    that it sees, in a row of more than there are stages, and ends in a partial one.
    """
    facts = device_facts.DeviceFacts("sm_90", 1, 1 << 20, "one program, so that stages go round")
    monkeypatch.setattr(hopper, "facts_of", lambda device: facts)
    layout = GistLayout.from_segments([32], 208, tail=22, sink_tokens=0)
    check(layout, device)
    every = plants()
    assert len(every) > 60
    for kind, number in every:
        with dropped(kind, number), pytest.raises(Exception, match=r"wait|fence|deadlock|overwrites|NaN|ends before"):
            check(layout, device)


@pytest.mark.parametrize("block_cols", [64, 128])
@pytest.mark.parametrize("name", ["segments", "gap", "hierarchical", "past-rows-and-tail"])
def test_walks_are_what_the_work_counter_says(name, block_cols, device):
    layout, positions = LAYOUTS[name](), 16
    tiles = -(-layout.num_rows // (2 * positions))
    table = torch.full((tiles, fwd_work.FIELDS), torch.nan, device=device)
    rule = tuple(vector.to(device) for vector in (layout.gist_begin, layout.gist_end, layout.local_begin))
    meta = fwd_work.WorkMeta(positions, 2 * positions, block_cols)
    fwd_work.sm90_gist_attn_fwd_work_kernel[(tiles,)](table, rule, layout.num_rows, layout.num_local, tiles, META=meta)
    halves = table.cpu().view(torch.int32)[:, 8:].reshape(2 * tiles, 8)[:, :4]
    expected = torch.from_numpy(np.stack(walks(layout, positions, block_cols), 1))
    assert torch.equal(halves[: len(expected)].long(), expected)
    assert (halves[len(expected) :] == 0).all(), "half tiles beyond the last row"


@pytest.mark.parametrize("choice", ["never", "auto"])
def test_plain_kernels_where_nobody_asks(choice, device, monkeypatch):
    """`auto` goes by the config row, which says that no clock has compared the two."""
    monkeypatch.setenv(hopper.ENVIRONMENT, choice)
    monkeypatch.setitem(configs.HOPPER, ("fwd", 64), SHIPPED["fwd", 64])
    q = torch.empty(1, 4, 32, 64, dtype=torch.bfloat16, device=device)
    assert not hopper.wanted("fwd", q, q)


def test_why_not(device, monkeypatch):
    q = torch.empty(1, 4, 32, 64, dtype=torch.bfloat16, device=device)
    assert hopper.wanted("fwd", q, q)
    wrong = {
        "float16 or bfloat16, not torch.float32": q.float(),
        "a head dimension of 64 or 128, not 32": q[..., :32],
        "rows that lie dense": q.expand(2, 4, 32, 64),
    }
    for reason, tensor in wrong.items():
        with pytest.raises(RuntimeError, match=f"GISTKERN_HOPPER=always, but Hopper's kernels need {reason}"):
            hopper.wanted("fwd", tensor)
    monkeypatch.setattr(hopper, "facts_of", lambda device: device_facts.DeviceFacts("sm_100", 3, 1 << 20, "test"))
    with pytest.raises(RuntimeError, match="need a Hopper GPU"):
        hopper.wanted("fwd", q)
    monkeypatch.setenv(hopper.ENVIRONMENT, "yes")
    with pytest.raises(ValueError, match="expected one of auto, always, never"):
        hopper.wanted("fwd", q)


def test_the_script_that_picks_tiles(device, monkeypatch):
    """Its times are those of an emulator here; the rows follow from made-up ones."""
    monkeypatch.setattr(picker, "HEADS", (2, 1))
    monkeypatch.setattr(picker, "ROUNDS", 1)
    narrow, wide = Variant(64, 64, 2), Variant(64, 128, 2)
    layout = GistLayout.from_segments([30], 2, tail=9).to(device)
    found = picker.timed("small", layout, 64, (narrow, wide), "cpu" if SANITIZED else device)
    assert set(found.milliseconds) == {None, narrow, wide}
    assert all(time > 0 for time in found.milliseconds.values())
    times = [found._replace(milliseconds={None: 2.0, narrow: 1.0, wide: 1.8})]
    times.append(found._replace(milliseconds={None: 2.0, narrow: 1.9, wide: 1.2}))
    row = picker.pick_rows(times)["fwd", 64]
    assert (row.block_cols, row.num_stages, row.chosen) == (64, 2, True)
    times.append(found._replace(milliseconds={None: 2.0, narrow: 2.2, wide: 3.0}))
    row = picker.pick_rows(times)["fwd", 64]
    assert (row.block_cols, row.chosen, row.why) == (64, False, "0.50 to 1.10 of the plain kernel's time")
