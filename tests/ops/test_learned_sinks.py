"""Learned sinks: a logit per head in every row's softmax, against a dense statement of its own."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import layouts

from gistkern import GistLayout, KeyValueRows, backends, gist_attention, gist_decode
from gistkern.backends import reference
from gistkern.ops import library
from gistkern.ops.sinks import gradient_of_sinks
from gistkern.rows import gather_rows
from gistkern.testing import compare, make_inputs

ON_CPU = [name for name in ("cpu", "sdpa", "reference") if backends.get(name).missing() is None]
LAYOUT = GistLayout.from_segments([9, 7], 2, tail=3)


@given(
    layouts(),
    st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([name for name in ON_CPU if name != "reference"]),
    st.integers(0, 2**31),
)
def test_any_layout_agrees_with_the_oracle(layout, heads, dtype, backend, seed):
    shape = {"heads": heads[0], "kv_heads": heads[1], "head_dim": 24, "dtype": dtype, "seed": seed}
    compare(make_inputs(layout, **shape, learned_sinks=True), layout, backend)


def test_the_oracle_is_the_softmax_of_gpt_oss():
    """transformers' own: the sink is one more column, whose probability is dropped."""
    layout = GistLayout.from_segments([], 1, tail=7)
    x = make_inputs(layout, heads=4, kv_heads=4, dtype=torch.float64, learned_sinks=True)
    scores = (x.q @ x.k.mT) * x.q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    columns = torch.cat([scores, x.learned_sinks[:, None, None].expand(1, -1, 7, 1)], -1)
    wanted = columns.softmax(-1)[..., :-1] @ x.v
    out, lse = reference.from_layout(x.q, x.k, x.v, layout, learned_sinks=x.learned_sinks)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, columns.logsumexp(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "layout", [GistLayout.from_segments([2, 2], 1, tail=2), GistLayout.decode(3, 2, rows=2)], ids=["forward", "decode"]
)
def test_gradcheck(backend, layout):
    x = make_inputs(layout, heads=2, kv_heads=1, head_dim=2, dtype=torch.float64, learned_sinks=True)
    leaves = x.leaves()

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        return gist_attention(*(given.pop(name) for name in "qkv"), layout, **given, backend=backend)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("backend", ON_CPU)
def test_opcheck(backend):
    x = make_inputs(LAYOUT, head_dim=16, learned_sinks=True)
    compact = [gather_rows(t, LAYOUT.gather).detach().requires_grad_() for t in (x.k, x.v)]
    vectors = (LAYOUT.gist_begin, LAYOUT.gist_end, LAYOUT.local_begin)
    arguments = (x.q, x.k, x.v, *compact, *vectors, 0.25, backend, x.learned_sinks)
    torch.library.opcheck(library.attention, arguments)
    out, lse = (t.detach() for t in library.attention(*arguments))
    torch.library.opcheck(gradient_of_sinks, (x.grad_out, out, lse, x.learned_sinks.detach()))


def test_compiles_as_one_graph():
    x = make_inputs(LAYOUT, learned_sinks=True)

    def loss(q, k, v, sinks):
        return gist_attention(q * 2, k, v, LAYOUT, learned_sinks=sinks * 2).square().sum()

    leaves = (x.q, x.k, x.v, x.learned_sinks)
    eager, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ON_CPU)
def test_rows_that_see_nothing_stay_empty(backend):
    ids = torch.tensor([[1, 2, 90, 3, 0, 0], [0, 0, 0, 1, 2, 3]])
    layout = GistLayout.from_input_ids(ids, [90], ids != 0)
    x = make_inputs(layout, learned_sinks=True)
    given = {"learned_sinks": x.learned_sinks, "backend": backend}
    out, lse = gist_attention(x.q, x.k, x.v, layout, **given, return_lse=True)
    assert (out.transpose(1, 2)[ids == 0] == 0).all()
    assert (lse.transpose(1, 2)[ids == 0] == -torch.inf).all()
    for gradient in torch.autograd.grad(out, list(x.leaves().values()), x.grad_out):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("size", [-1e4, 1e4], ids=["no sink", "all sink"])
def test_extreme_logits(backend, size):
    """A sink far below the scores is none, one far above takes everything; no NaN either way."""
    x = make_inputs(LAYOUT, learned_sinks=True)
    sinks = (x.learned_sinks.detach() + size).requires_grad_()
    out = gist_attention(x.q, x.k, x.v, LAYOUT, learned_sinks=sinks, backend=backend)
    plain = gist_attention(x.q, x.k, x.v, LAYOUT, backend=backend)
    torch.testing.assert_close(out, plain if size < 0 else torch.zeros_like(plain))
    leaves = (x.q, x.k, x.v)
    (of_sinks, *rest) = torch.autograd.grad(out, (sinks, *leaves), x.grad_out)
    assert (of_sinks == 0).all()
    for ours, theirs in zip(rest, torch.autograd.grad(plain, leaves, x.grad_out), strict=True):
        torch.testing.assert_close(ours, theirs if size < 0 else torch.zeros_like(theirs))


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_backward_of_few_rows_forms_one_score(size):
    """The decode kernel sums in an order of its own: the backward finds the sink in its LSE again."""
    layout = GistLayout.decode(5, 0, rows=2)
    x = make_inputs(layout, head_dim=64, learned_sinks=True)
    large = {n: (getattr(x, n) * size).detach().requires_grad_() for n in ("q", "learned_sinks")}
    compare(replace(x, **large), layout)


def test_decoding_over_a_pool_takes_them_too():
    layout = GistLayout.decode(6, 3, rows=2)
    x = make_inputs(layout, dtype=torch.float32, learned_sinks=True)
    with torch.no_grad():
        wanted = reference.from_layout(
            x.q, x.k, x.v, layout, past=(x.past_key, x.past_value), learned_sinks=x.learned_sinks
        )
        pool = KeyValueRows(x.past_key[0].transpose(0, 1), x.past_value[0].transpose(0, 1))
        begin, end = torch.tensor([0], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
        given = {"gist_begin": begin, "gist_end": end, "learned_sinks": x.learned_sinks}
        found = gist_decode(x.q, pool, KeyValueRows(x.k, x.v), **given)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="gist_decode has no gradient"):
        gist_decode(x.q.detach(), pool, KeyValueRows(x.k.detach(), x.v.detach()), **given)


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_second_derivative_is_an_error(backend):
    x = make_inputs(LAYOUT, head_dim=16, learned_sinks=True)
    out = gist_attention(x.q, x.k, x.v, LAYOUT, learned_sinks=x.learned_sinks, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), x.learned_sinks, create_graph=True)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(gradient.square().sum(), x.learned_sinks)


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        ([0.0] * 4, TypeError, "learned_sinks must be a tensor, got list"),
        (torch.zeros(2), ValueError, r"floats \[4\], one for each query head, got torch.float32 \(2,\)"),
        (torch.zeros(4, 1), ValueError, "one for each query head"),
        (torch.zeros(4).int(), ValueError, "got torch.int32"),
        (torch.zeros(4, device="meta"), ValueError, "learned_sinks is on meta, q on cpu"),
    ],
)
def test_bad_sinks_say_what_is_wrong(sinks, error, message):
    x = make_inputs(LAYOUT)
    with pytest.raises(error, match=message):
        gist_attention(x.q, x.k, x.v, LAYOUT, learned_sinks=sinks)
