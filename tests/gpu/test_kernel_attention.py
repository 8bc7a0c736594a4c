"""Forward and backward kernels against the fp64 oracle, within the error budgets of docs/concepts/numerics.md."""

import pytest
import torch
from emulation import EMULATED, INTERPRETED, SANITIZED, tiles
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from strategies import layouts

from gistkern import GistLayout, gist_attention
from gistkern.kernels import arguments, attn_bwd_dkv, configs
from gistkern.kernels import device as device_facts
from gistkern.testing import Inputs, compare, make_inputs

# emulation is slow, the sanitizer most of all; on a GPU nearly every example has strides that compile new kernels
PHASES = (Phase.explicit, Phase.generate) if EMULATED else tuple(Phase)
EXAMPLES = 10 if INTERPRETED else 4 if EMULATED else 24

# The interpreter multiplies bfloat16 wrongly (kernels/primitives.py, matmul), ttsem does not. What ttsem looks for in
# memory is the same for every type, and the other tests below run in fp32 and fp16.
DTYPES = [torch.bfloat16] if SANITIZED else [torch.float32, torch.float16, torch.bfloat16]

slow_under_the_sanitizer = pytest.mark.skipif(SANITIZED, reason="many launches; the interpreter runs them")

LAYOUTS = {
    "T=1": lambda: GistLayout.from_segments([], 1, tail=1),
    "T=63-segments": lambda: GistLayout.from_segments([20, 17, 13], 3, tail=4),
    "T=71-one-segment": lambda: GistLayout.from_segments([], 1, tail=71, sink_tokens=0),
    "T=70-wide-gists": lambda: GistLayout.from_segments([7, 5], 25, tail=8),
    "T=66-hierarchical": lambda: GistLayout.hierarchical([11] * 4, 3, 5, tail=5),
    "T=66-hierarchical-seeing": lambda: GistLayout.hierarchical([11] * 4, 3, 5, tail=5, see_earlier_gists=True),
    "T=60-sliding": lambda: GistLayout.sliding(60, 21, 8, gists=2),
    "packed": lambda: GistLayout.pack([GistLayout.from_segments([n, 9], 2, tail=3) for n in (11, 30, 1)]),
    "left-padded": lambda: GistLayout.stack([GistLayout.from_segments([n], 2, tail=5) for n in (40, 3)], "left"),
    "right-padded": lambda: GistLayout.stack([GistLayout.from_segments([n], 2, tail=5) for n in (40, 3)], "right"),
    "past": lambda: GistLayout.from_segments([20, 20], 3, tail=6, past=19),
    "ragged-past": lambda: GistLayout.from_input_ids(
        torch.tensor([[1, 2, 90, 3] * 6] * 2), [90], past=torch.tensor([0, 17])
    ),
    "past-rows-and-tail": lambda: GistLayout.from_segments([30, 30], 4, tail=20).last_rows(33),
}


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_scheme(name, dtype, device, small_tiles):
    layout = LAYOUTS[name]().to(device)
    compare(make_inputs(layout, heads=4, kv_heads=2, dtype=dtype), layout, "triton")


@pytest.mark.parametrize("name", ["T=63-segments", "left-padded", "past-rows-and-tail"])
def test_windows_and_learned_sinks(name, device, small_tiles):
    layout = LAYOUTS[name]().to(device).windowed(9)
    compare(make_inputs(layout, heads=4, kv_heads=2, dtype=DTYPES[0], learned_sinks=True), layout, "triton")


@pytest.mark.parametrize("rows", [1, 3])
def test_decoding_with_learned_sinks(rows, device, small_tiles):
    layout = GistLayout.decode(torch.tensor([19, 7]), torch.tensor([5, 0]), rows=rows).to(device).windowed(4)
    compare(make_inputs(layout, heads=4, kv_heads=2, dtype=DTYPES[0], learned_sinks=True), layout, "triton")


@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 128, 192, 256])
@pytest.mark.slow
def test_head_dimensions(head_dim, device, small_tiles):
    layout = GistLayout.from_segments([19, 14], 3, tail=4).to(device)
    compare(make_inputs(layout, heads=2, kv_heads=1, head_dim=head_dim, dtype=torch.float16), layout, "triton")


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (9, 3), (20, 1)], ids=str)
@pytest.mark.slow
def test_head_groups(heads, device, small_tiles):
    """Groups that fill a tile, that do not divide it, and that are larger than it."""
    layout = GistLayout.stack([GistLayout.from_segments([11, 7], 3, tail=2), GistLayout.from_segments([9], 2)])
    layout = layout.to(device)
    # float16: with 20 heads the order in which fp32 sums run over heads already exceeds an fp32 budget
    compare(make_inputs(layout, heads=heads[0], kv_heads=heads[1], dtype=torch.float16), layout, "triton")


@pytest.mark.parametrize("blocks", [(16, 32), (32, 16), *([] if SANITIZED else [(64, 16), (16, 64)])], ids=str)
@pytest.mark.parametrize("two_loops", [False, True], ids=["one-loop", "two-loops"])
@pytest.mark.slow
def test_tile_shapes(blocks, two_loops, device):
    layout = GistLayout.from_segments([40, 25, 31], 5, tail=7).to(device)
    with configs.overridden(**tiles(*blocks, two_loops)):
        compare(make_inputs(layout, heads=4, kv_heads=2), layout, "triton")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"] if EMULATED else ["this device"])
@pytest.mark.slow
def test_shipped_configs(arch, device, monkeypatch):
    """What a user's call runs: several tiles of the real sizes, and the loads that AMD needs."""
    if EMULATED:
        monkeypatch.setattr(device_facts, "EMULATED_ARCH", arch)
    layout = GistLayout.from_segments([70, 90], 6, tail=40).to(device)
    compare(make_inputs(layout, heads=4, kv_heads=1, head_dim=64, dtype=torch.bfloat16), layout, "triton")


@pytest.mark.slow
def test_shipped_configs_of_fp32(device):
    layout = GistLayout.from_segments([50, 40], 6, tail=10).to(device)
    compare(make_inputs(layout, heads=2, kv_heads=1), layout, "triton")


@settings(
    max_examples=EXAMPLES,
    phases=PHASES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    layouts(),
    st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]),
    st.sampled_from([16, 24, 32]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 2**31),
)
@pytest.mark.slow
def test_any_layout(device, layout, heads, head_dim, dtype, seed):
    layout = layout.to(device)
    inputs = make_inputs(layout, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype, seed=seed)
    with configs.overridden(**tiles(16, 16)):
        compare(inputs, layout, "triton")


# the tile at which a wrong bound shows is one in sixteen, so every offset is tried
@slow_under_the_sanitizer
@pytest.mark.parametrize("two_loops", [False, True], ids=["one-loop", "two-loops"])
@pytest.mark.slow
def test_every_offset_of_the_unmasked_columns(two_loops, device):
    """One more unmasked column would let a row see a later token."""
    with configs.overridden(**tiles(16, 16, two_loops)):
        for past in range(16):
            layout = GistLayout.from_segments([], 1, tail=34, past=past, sink_tokens=0).to(device)
            compare(make_inputs(layout, heads=1, kv_heads=1, head_dim=16), layout, "triton")


@slow_under_the_sanitizer
@pytest.mark.slow
def test_every_offset_of_the_unmasked_rows(device):
    """The same for the row steps of dk and dv."""
    with configs.overridden(**tiles(16, 16)):
        for length in range(1, 17):
            segments = GistLayout.from_segments([length, 30], 1, tail=20, sink_tokens=0)
            after_a_tail = GistLayout.from_segments([], 1, tail=34 + length, sink_tokens=0).last_rows(34)
            for layout in (segments.to(device), after_a_tail.to(device)):
                compare(make_inputs(layout, heads=1, kv_heads=1, head_dim=16), layout, "triton")


@pytest.mark.slow
def test_heads_in_several_sections(device, small_tiles, monkeypatch):
    """Sections of 3 of 8 heads: the last one is smaller."""
    for module in (arguments, attn_bwd_dkv):
        monkeypatch.setattr(module, "section_heads", lambda *sizes: 3)
    layout = GistLayout.stack([GistLayout.from_segments([11, 9], 3, tail=4) for _ in range(2)]).to(device)
    compare(make_inputs(layout, heads=8, kv_heads=4, head_dim=16), layout, "triton")


def test_rows_that_see_nothing_are_zero_and_harmless(device, small_tiles):
    ids = torch.tensor([[1, 2, 90, 3, 0, 0] * 4, [0] * 24], device=device)
    mask = (ids > 0).long()
    mask[0, 6:] = 0
    layout = GistLayout.from_input_ids(ids, [90], mask)
    inputs = make_inputs(layout)
    out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, return_lse=True, backend="triton")
    padding = mask == 0
    assert (out.transpose(1, 2)[padding] == 0).all()
    assert (lse.transpose(1, 2)[padding] == -torch.inf).all()
    assert lse.transpose(1, 2)[~padding].isfinite().all()
    for gradient in torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.grad_out):
        assert (gradient.transpose(1, 2)[padding] == 0).all()
        assert gradient.isfinite().all()


def test_what_no_row_sees_cannot_reach_the_output(device, small_tiles):
    """Other context, same gist rows: the tail's output and gradient are bit-identical."""
    layout = GistLayout.from_segments([50], 4, tail=40).to(device)
    inputs = make_inputs(layout)
    rows = layout.gather[0]
    results = []
    for factor in (1.0, -1e4):
        k, v = (t.detach().clone() for t in (inputs.k, inputs.v))
        for tensor in (k, v):
            kept = tensor[:, :, rows].clone()
            tensor[:, :, :50] *= factor
            tensor[:, :, rows] = kept
        q = inputs.q.detach().clone().requires_grad_()
        out = gist_attention(q, k, v, layout, backend="triton")
        (dq,) = torch.autograd.grad(out, q, inputs.grad_out)
        results.append((out[:, :, 54:], dq[:, :, 54:], out[:, :, 10]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][2], results[1][2]), "the context's own rows do see it"


@pytest.mark.slow
def test_two_runs_are_bit_identical(device, small_tiles):
    layout = GistLayout.hierarchical([24] * 4, 3, 5, tail=10).to(device)
    inputs = make_inputs(layout, heads=6, kv_heads=2, dtype=torch.float16)
    leaves = tuple(inputs.leaves().values())
    runs = []
    for _ in range(2):
        out, lse = gist_attention(*leaves, layout, return_lse=True, backend="triton")
        runs.append([out, lse, *torch.autograd.grad(out, leaves, inputs.grad_out)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def laid_out(tensor, order):
    """The same values as a leaf whose heads and rows lie in memory in another order, with a gap after each row."""
    storage = torch.full((*tensor.permute(order).shape[:3], tensor.shape[3] + 16), torch.nan, device=tensor.device)
    storage = storage.to(tensor.dtype)
    storage[..., : tensor.shape[3]] = tensor.detach().permute(order)
    inverse = [order.index(axis) for axis in range(4)]
    return storage[..., : tensor.shape[3]].permute(inverse).requires_grad_()


def test_every_input_may_have_strides_of_its_own(device, small_tiles):
    """transformers passes [B, N, H, D] storage viewed as [B, H, N, D]; no two inputs share their strides here."""
    ids = torch.tensor([[1] * 15 + [90] * 3 + [1] * 10 + [90] * 3 + [1] * 5] * 2, device=device)
    layout = GistLayout.from_input_ids(ids, [90], past=7)
    plain = make_inputs(layout, head_dim=16)
    orders = [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (1, 2, 0, 3), (2, 0, 1, 3), (2, 1, 0, 3)]
    names = ("q", "k", "v", "past_key", "past_value", "grad_out")
    views = {name: laid_out(getattr(plain, name), order) for name, order in zip(names, orders, strict=True)}
    views["grad_out"] = views["grad_out"].detach()
    compare(Inputs(**views), layout, "triton")


def test_the_gradient_of_a_sum(device, small_tiles):
    """It arrives as one number, expanded."""
    layout = GistLayout.from_segments([15], 3, tail=5).to(device)
    inputs = make_inputs(layout)
    leaves = (inputs.q, inputs.k, inputs.v)
    out = gist_attention(*leaves, layout, backend="triton")
    expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    written_out = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, written_out, strict=True))
