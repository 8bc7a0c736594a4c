"""The op against the dense fp64 oracle: values, gradients, and the contracts around them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts
from torch.utils.checkpoint import checkpoint

from gistkern import GistLayout, backends, gist_attention
from gistkern.ops import library
from gistkern.rows import gather_rows
from gistkern.testing import compare, make_inputs


@given(
    layouts(),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (9, 3)]),
    st.sampled_from([16, 24, 40, 64, 80, 96, 128]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_any_layout_agrees_with_the_oracle(layout, heads, head_dim, dtype, seed):
    inputs = make_inputs(layout, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype, seed=seed)
    compare(inputs, layout)


@given(layouts(), st.integers(0, 2**31))
def test_fp64_agrees_to_fp64(layout, seed):
    inputs = make_inputs(layout, dtype=torch.float64, seed=seed)
    past = {"past_key": inputs.past_key, "past_value": inputs.past_value} if layout.past else {}
    results = [
        gist_attention(inputs.q, inputs.k, inputs.v, layout, backend=backend, return_lse=True, **past)
        for backend in ("sdpa", "reference")
    ]
    leaves = list(inputs.leaves().values())
    gradients = [torch.autograd.grad(out, leaves, inputs.grad_out) for out, _ in results]
    for ours, oracle in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)


# backends that this installation has on the CPU
ON_CPU = [name for name in ("cpu", "sdpa", "reference") if backends.get(name).missing() is None]

LONG = {
    "T=1": GistLayout.from_segments([], 1, tail=1),
    "T=63": GistLayout.from_segments([60], 3),
    "T=111-one-segment": GistLayout.from_segments([100], 1, tail=10),
    "T=1000-equal": GistLayout.from_segments([117] * 8, 8, tail=0),
    "T=700-hierarchical": GistLayout.hierarchical([64] * 10, 4, 10, tail=10),
    "T=777-sliding": GistLayout.sliding(777, 128, 32, gists=2),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_layouts_agree_with_the_oracle(name, dtype):
    compare(make_inputs(LONG[name], head_dim=64, dtype=dtype), LONG[name])


# heads, head_dim: groups that do not fit one work item, more query heads than lanes, odd and tiny rows
SHAPES = [(6, 2, 64), (11, 1, 33), (24, 1, 16), (4, 4, 1), (4, 2, 7), (2, 1, 17)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.slow
def test_sequences_of_several_chunks_and_splits_agree_with_the_oracle(heads, kv_heads, head_dim):
    """Rows enough that the backward is cut into chunks, cached rows enough that decoding is split."""
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    training = GistLayout.from_segments([240] * 4, 8, tail=40)  # 1,032 rows: two chunks
    if heads <= 6:  # the oracle takes 8 bytes a head, row and column
        training = GistLayout.stack([training, GistLayout.from_segments([400, 600], 3)], "right")
    compare(make_inputs(training, **shape), training)
    decoding = GistLayout.decode(torch.tensor([5000, 3, 2100]), torch.tensor([20, 0, 7]), rows=2)
    compare(make_inputs(decoding, **shape), decoding)


@pytest.mark.parametrize("size", [100.0, 1e3])
def test_large_scores_keep_the_budget(size):
    """Probabilities are exp(score - lse): both from one rounding of the score."""
    layout = GistLayout.from_segments([40, 9], 3, tail=30)
    inputs = make_inputs(layout, heads=4, kv_heads=2, head_dim=64)
    scaled = replace(
        inputs, q=(inputs.q * size).detach().requires_grad_(), k=(inputs.k * size).detach().requires_grad_()
    )
    compare(scaled, layout)


def test_rows_that_see_nothing_are_zero_and_harmless():
    ids = torch.tensor([[1, 2, 90, 3, 0, 0], [0, 0, 0, 1, 2, 3], [0] * 6])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0] * 6])
    layout = GistLayout.from_input_ids(ids, [90], mask)
    inputs = make_inputs(layout)
    out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, return_lse=True)
    padding = mask == 0
    assert (out.transpose(1, 2)[padding] == 0).all()
    assert (lse.transpose(1, 2)[padding] == -torch.inf).all()
    assert lse.transpose(1, 2)[~padding].isfinite().all()
    for gradient in torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.grad_out):
        assert (gradient.transpose(1, 2)[padding] == 0).all()
        assert gradient.isfinite().all()


def test_what_no_row_sees_cannot_reach_the_output():
    """NaN in the context's raw rows, with the gist rows held fixed, leaves the tail's rows bit-identical."""
    layout = GistLayout.from_segments([50], 4, tail=40, sink_tokens=1)
    inputs = make_inputs(layout, dtype=torch.float32)
    rows = layout.gather[0]
    poisoned = []
    for tensor in (inputs.k, inputs.v):
        bad = tensor.detach().clone()
        bad[:, :, :50] = torch.nan
        bad[:, :, rows] = tensor.detach()[:, :, rows]
        poisoned.append(bad)
    clean = gist_attention(inputs.q, inputs.k, inputs.v, layout)
    other = gist_attention(inputs.q, *poisoned, layout)
    assert torch.equal(clean[:, :, 54:], other[:, :, 54:])
    assert other[:, :, 10].isnan().any(), "the context's own rows do see it: the poison is real"


def test_gradient_of_the_tail_stops_at_the_gist_rows():
    """With the gist rows detached, the tail's loss has exactly no gradient in the context's rows."""
    layout = GistLayout.from_segments([30], 3, tail=5, sink_tokens=0)
    inputs = make_inputs(layout)
    compact = [gather_rows(t, layout.gather).detach() for t in (inputs.k, inputs.v)]
    vectors = (layout.gist_begin, layout.gist_end, layout.local_begin)
    out, _ = library.attention(inputs.q, inputs.k, inputs.v, *compact, *vectors, 0.1, ON_CPU[0])
    for gradient in torch.autograd.grad(out[:, :, 33:].square().sum(), (inputs.k, inputs.v)):
        assert (gradient[:, :, :33] == 0).all()
        assert (gradient[:, :, 33:] != 0).any()


@pytest.mark.parametrize("name", ["T=700-hierarchical", "T=777-sliding"])
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_are_bit_identical(name, threads, request):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    layout = LONG[name]
    inputs = make_inputs(layout, heads=6, kv_heads=2)
    runs = []
    for _ in range(2):
        out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, return_lse=True)
        runs.append([out, lse, *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.grad_out)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ON_CPU)
def test_opcheck(backend):
    layout = GistLayout.from_segments([9, 7], 2, tail=3)
    inputs = make_inputs(layout, head_dim=16)
    compact = [gather_rows(t, layout.gather).detach().requires_grad_() for t in (inputs.k, inputs.v)]
    vectors = (layout.gist_begin, layout.gist_end, layout.local_begin)
    arguments = (inputs.q, inputs.k, inputs.v, *compact, *vectors, 0.25, backend)
    torch.library.opcheck(library.attention, arguments)
    out, lse = (t.detach() for t in library.attention(*arguments))
    plain = [t.detach() for t in arguments[:5]]
    torch.library.opcheck(library.attention_backward, (inputs.grad_out, *plain, out, lse, *vectors, 0.25, backend))


def test_compiles_as_one_graph():
    layout = GistLayout.hierarchical([40] * 3, 4, 5, tail=6)
    inputs = make_inputs(layout)

    def loss(q, k, v):
        return gist_attention(q * 2, k, v, layout).square().sum()

    eager = loss(inputs.q, inputs.k, inputs.v)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(compiled, eager)
    leaves = (inputs.q, inputs.k, inputs.v)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_activation_checkpointing_changes_nothing():
    layout = GistLayout.from_segments([30, 30], 4, tail=6)
    inputs = make_inputs(layout)
    leaves = (inputs.q, inputs.k, inputs.v)
    plain = gist_attention(*leaves, layout)
    again = checkpoint(lambda q, k, v: gist_attention(q, k, v, layout), *leaves, use_reentrant=False)
    assert torch.equal(plain, again)
    for a, b in zip(
        torch.autograd.grad(plain, leaves, inputs.grad_out),
        torch.autograd.grad(again, leaves, inputs.grad_out),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_strided_inputs_give_the_same():
    """transformers passes [B, N, H, D] storage viewed as [B, H, N, D]."""
    layout = GistLayout.from_segments([40, 40], 3, tail=5)
    inputs = make_inputs(layout)
    views = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)]
    torch.testing.assert_close(
        gist_attention(*views, layout), gist_attention(inputs.q, inputs.k, inputs.v, layout).detach()
    )


def test_scale_and_lse_follow_the_definition():
    layout = GistLayout.from_segments([], 1, tail=4)
    inputs = make_inputs(layout, heads=1, kv_heads=1, dtype=torch.float64)
    out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, scale=0.3, return_lse=True)
    scores = 0.3 * inputs.q[0, 0, 3] @ inputs.k[0, 0].T
    torch.testing.assert_close(lse[0, 0, 3], scores.logsumexp(0).detach())
    torch.testing.assert_close(out[0, 0, 3], scores.softmax(0) @ inputs.v[0, 0])
    assert not lse.requires_grad


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_second_derivative_is_an_error(backend):
    """It would otherwise be zero, silently: a gradient penalty would train on nothing."""
    layout = GistLayout.from_segments([9], 2, tail=3)
    inputs = make_inputs(layout, head_dim=16)
    out = gist_attention(inputs.q, inputs.k, inputs.v, layout, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(gradient.square().sum(), inputs.q)


def test_compaction_is_twice_differentiable():
    layout = GistLayout.from_segments([4, 3], 2, tail=3, sink_tokens=2)
    k, v = (torch.randn(1, 2, layout.num_local, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    call = lambda k, v: library.compact(k, v, None, None, layout.gather, "sdpa")  # noqa: E731
    assert torch.autograd.gradcheck(call, (k, v))
    assert torch.autograd.gradgradcheck(call, (k, v))


def good_call():
    layout = GistLayout.from_segments([5], 2, tail=2)
    inputs = make_inputs(layout, head_dim=16)
    return {"q": inputs.q, "k": inputs.k, "v": inputs.v, "layout": layout}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: {"q": c["q"][0]}, ValueError, r"q must be \[batch, heads, rows, head_dim\]"),
        (lambda c: {"q": c["q"][:0]}, ValueError, "q has 0 samples of 9 rows"),
        (lambda c: {"q": c["q"][:, :3]}, ValueError, "positive multiple of key/value heads"),
        (lambda c: {"q": c["q"][:, :0]}, ValueError, r"query heads \(0\) must be a positive multiple"),
        (lambda c: {"q": c["q"][:, :, 1:]}, ValueError, "q has 1 samples of 8 rows, the layout 1 of 9"),
        (lambda c: {"k": c["k"][:, :, 1:]}, ValueError, "k must be"),
        (lambda c: {"v": c["v"][..., 1:]}, ValueError, "v must be"),
        (lambda c: {"v": c["v"].double()}, ValueError, "v is torch.float64 on cpu, q torch.float32"),
        (lambda c: {"past_key": c["k"]}, ValueError, "go together"),
        (lambda c: {"past_key": c["k"], "past_value": c["v"]}, ValueError, "expects 0 past rows, past_key has 9"),
        (lambda c: {"scale": 0.0}, ValueError, "scale must be a positive number, got 0.0"),
        (lambda c: {"backend": "triton"}, RuntimeError, "'triton' serves CUDA and ROCm tensors, got cpu"),
        (
            lambda c: {"backend": "fast"},
            ValueError,
            "unknown backend 'fast': expected 'auto' or one of torch, cuda, triton, cpu, sdpa, reference",
        ),
        (lambda c: {"layout": c["layout"].to("meta")}, ValueError, "the layout is on meta"),
        (
            lambda c: {name: c[name].half() for name in "qkv"} | {"backend": "reference"},
            RuntimeError,
            "pass float32 or float64",
        ),
        (lambda c: {name: c[name].int() for name in "qkv"}, ValueError, "got torch.int32"),
    ],
)
def test_bad_calls_say_what_is_wrong(change, error, message):
    call = good_call()
    call.update(change(call))
    layout = call.pop("layout")
    with pytest.raises(error, match=message):
        gist_attention(call.pop("q"), call.pop("k"), call.pop("v"), layout, **call)


def test_a_device_that_no_backend_serves_is_an_error():
    call = {name: value.to("meta") for name, value in good_call().items()}
    with pytest.raises(RuntimeError, match=r"no backend can serve .* sdpa serves CPU tensors, got meta"):
        gist_attention(call["q"], call["k"], call["v"], call["layout"])
