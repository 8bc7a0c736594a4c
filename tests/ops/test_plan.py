"""What a layout's plan runs, beside the operators that torch.compile sees: values, gradients, and what ends a plan."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layouts
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gistkern import GistLayout, backends, gist_attention
from gistkern.ops import attention
from gistkern.ops.attention import AttentionOptions, attend
from gistkern.testing import compare, make_inputs

ON_CPU = [name for name in ("cpu", "sdpa") if backends.get(name).missing() is None]


class Operators(TorchDispatchMode):
    """Names of the operators within the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def leaves_of(inputs):
    """Fresh leaves in the order of `attend`: q, k, v, past_key, past_value."""
    given = inputs.q, inputs.k, inputs.v, inputs.past_key, inputs.past_value
    return [None if t is None else t.detach().clone().requires_grad_() for t in given]


def attended(leaves, layout, backend, sinks=None):
    q, k, v, past_key, past_value = leaves
    options = AttentionOptions(None, backend, sinks)
    return attend(q, k, v, layout, options, past_key=past_key, past_value=past_value)


def good_layout():
    # a sink is listed twice, and a sample is shorter: its list ends in a filler
    documents = [GistLayout.sliding(30, 8, 4, gists=2, sink_tokens=2), GistLayout.from_segments([9, 5], 2, tail=4)]
    return GistLayout.stack(documents)


def repeated():
    """A layout whose gather list names one token three times, for rows that see one each."""
    layout = GistLayout.from_segments([4], 1, tail=6, sink_tokens=0)
    begin, end = layout.gist_begin.clone(), layout.gist_end.clone()
    rows = layout.num_rows
    begin[0, rows - 4 :], end[0, rows - 4 :] = 1, 2
    begin[0, rows - 2 :], end[0, rows - 2 :] = 2, 3
    gather = layout.gather.expand(1, 3).contiguous()
    return replace(layout, gist_begin=begin, gist_end=end, gather=gather, keep_end=layout.keep_end + 2)


@given(
    layouts(),
    st.sampled_from(ON_CPU),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_plan_answers_as_the_operators_do(layout, backend, dtype, sinks, seed):
    inputs = make_inputs(layout, heads=6, kv_heads=2, head_dim=24, dtype=dtype, seed=seed)
    learned = torch.randn(6, requires_grad=True) if sinks else None
    found = []
    for by_operators in (False, True):
        leaves = leaves_of(inputs)
        with pytest.MonkeyPatch.context() as patch:
            if by_operators:
                patch.setattr(attention, "needs_operators", lambda *call: True)
            out, lse, gist_k, gist_v = attended(leaves, layout, backend, learned)
        wanted = [t for t in (*leaves, learned) if t is not None]
        gradients = torch.autograd.grad(out, wanted, inputs.grad_out, allow_unused=True)
        found.append((out, lse, gist_k, gist_v, *gradients))
    names = ("out", "lse", "gist_k", "gist_v", *(f"gradient {i}" for i in range(6)))
    filled = torch.cat([torch.ones(layout.batch_size, layout.past, dtype=torch.bool), layout.gather >= 0], 1)
    for name, plan, operators in zip(names, *found, strict=False):
        if operators is None or plan is None:
            assert plan is None or not plan.any(), name  # what nothing depends on
            assert operators is None or not operators.any(), name
        elif name.startswith("gist"):  # a filler is nobody's
            assert torch.equal(plan.transpose(1, 2)[filled], operators.transpose(1, 2)[filled]), name
        elif not name.startswith("gradient") or name == "gradient 0":
            assert torch.equal(plan, operators), name
        elif plan.numel():  # the plan rounds the sum of both gradients once, the operators each and their sum
            near = torch.finfo(dtype).eps * 4 * max(1.0, operators.abs().max().item())
            torch.testing.assert_close(plan, operators, rtol=0, atol=near)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [good_layout, repeated])
def test_gradients_of_gathered_rows_stay_in_the_budget(backend, make, dtype):
    """Of k and v, which hold those of their compact rows: a token that is listed thrice has three."""
    layout = make()
    compare(make_inputs(layout, head_dim=16, dtype=dtype), layout, backend)


@pytest.mark.parametrize("backend", ON_CPU)
def test_compact_rows_have_gradients_of_their_own(backend):
    """A cache that is trained through uses them after the call."""
    layout = GistLayout.from_segments([7, 5], 2, tail=3, past=4)
    inputs = make_inputs(layout, head_dim=16, dtype=torch.float32)
    found = []
    for by_operators in (False, True):
        leaves = leaves_of(inputs)
        with pytest.MonkeyPatch.context() as patch:
            if by_operators:
                patch.setattr(attention, "needs_operators", lambda *call: True)
            out, _, gist_k, gist_v = attended(leaves, layout, backend)
        alone = torch.autograd.grad(gist_k.sin().sum(), [leaves[1], leaves[3]], retain_graph=True)
        (out.square().sum() + gist_k.square().sum() + gist_v.sin().sum()).backward()
        found.append((*alone, *(leaf.grad for leaf in leaves)))
    for plan, operators in zip(*found, strict=True):
        torch.testing.assert_close(plan, operators, rtol=1e-5, atol=1e-5)


def test_calls_of_one_kind_share_a_plan_and_others_do_not():
    layout = good_layout()
    inputs = make_inputs(layout, head_dim=16, dtype=torch.float32)
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))
    first = gist_attention(q, k, v, layout)
    plan = layout.__dict__["_plan"]
    assert torch.equal(gist_attention(q.clone(), k.clone(), v.clone(), layout), first)
    assert layout.__dict__["_plan"] is plan
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gist_attention(q, transposed, v, layout), first)
    assert layout.__dict__["_plan"] is not plan
    assert torch.equal(gist_attention(q, k, v, layout), first)
    assert layout.__dict__["_plan"] is plan
    negated = torch._neg_view(-k)
    assert negated.is_neg()
    assert torch.equal(gist_attention(q, negated, v, layout), first), "the bits of a negated view are the negated ones"


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: {"v": v.double()},
        lambda q, k, v: {"k": k[:, :, 1:]},
        lambda q, k, v: {"past_key": k[:, :, :0]},
        lambda q, k, v: {"scale": -1.0},
        lambda q, k, v: {"backend": "fast"},
        lambda q, k, v: {"learned_sinks": torch.ones(99)},
        lambda q, k, v: {"q": q.to_sparse()},
    ],
    ids=["dtype", "rows", "half a past", "scale", "backend", "sinks", "sparse"],
)
def test_a_plan_lets_nothing_pass_that_its_making_refused(change, learns):
    layout = GistLayout.from_segments([5], 2, tail=2)
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=learns) for _ in range(3))
    gist_attention(q, k, v, layout)
    with pytest.raises((ValueError, RuntimeError)):
        gist_attention(**({"q": q, "k": k, "v": v, "layout": layout} | change(q, k, v)))


@pytest.mark.skipif("cpu" not in ON_CPU, reason="needs the extension")
def test_a_decode_step_is_looked_at_by_what_computes_it(monkeypatch):
    """From the second layer on; what it does not take goes the long way."""
    layout, fresh = GistLayout.decode(6, 8), GistLayout.decode(6, 8)
    q, k, v = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    rows = {"past_key": torch.randn(1, 2, 6, 16), "past_value": torch.randn(1, 2, 6, 16)}
    attention_of = lambda layout, k=k, v=v, q=q, **more: gist_attention(q, k, v, layout, **(rows | more))  # noqa: E731
    first, asked, key_of = attention_of(layout), [], attention.key_of
    monkeypatch.setattr(attention, "key_of", lambda *given: asked.append(1) or key_of(*given))
    assert torch.equal(attention_of(layout), first)
    assert torch.equal(attention_of(layout, k=k.transpose(1, 2).contiguous().transpose(1, 2)), first)
    assert torch.equal(attention_of(layout, k=torch._neg_view(-k)), first)
    assert not asked
    apart = torch.stack((k, k), -1)[..., 0]
    assert apart.stride(3) == 2
    torch.testing.assert_close(attention_of(layout, k=apart), first)
    assert len(asked) == 1
    for broken in (
        {"k": k[:, :, 1:]},
        {"k": torch.cat((k, k), 2), "v": torch.cat((v, v), 2)},
        {"past_key": k[:, :, :5], "past_value": k[:, :, :5]},
        {"past_key": k[:, :, :7], "past_value": k[:, :, :7]},
        {"past_value": None},
        {"k": k[0, 0]},
        {"k": k.double()},
        {"q": torch.randn(2, 4, 1, 16)},
        {"v": v.to("meta")},
    ):
        with pytest.raises(ValueError, match=r"must be|go together|make them equal|the layout expects|has 2 samples"):
            attention_of(layout, **broken)
        with pytest.raises(ValueError, match=r"must be|go together|make them equal|the layout expects|has 2 samples"):
            attention_of(fresh, **broken)
    assert torch.equal(attention_of(layout), first)
    layout.gist_end.fill_(3)
    torch.testing.assert_close(attention_of(layout), attention_of(layout, backend="reference"))
    layout.gist_end.fill_(7)
    with pytest.raises(ValueError, match="gist_end must not pass"):
        attention_of(layout)


def test_a_layout_that_was_written_to_is_looked_at_again():
    layout = GistLayout.from_segments([5], 2, tail=2)
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    out = gist_attention(q, q, q, layout)
    layout.gather[0, 0] = 99
    with pytest.raises(ValueError, match="gather"):
        gist_attention(q, q, q, layout)
    with pytest.raises(RuntimeError, match="modified by an inplace operation between a forward"):
        out.sum().backward()


def test_a_scale_that_is_a_tensor_counts_as_it_is_at_the_call():
    layout, other = (GistLayout.from_segments([5], 2, tail=2) for _ in range(2))
    q, scale = torch.randn(1, 2, 9, 16), torch.tensor(0.25)
    for value in (0.25, 1.0):
        scale.fill_(value)
        assert torch.equal(gist_attention(q, q, q, layout, scale=scale), gist_attention(q, q, q, other, scale=value))


@torch.inference_mode()
def test_vectors_that_count_no_writes_are_read_as_they_are():
    """Of inference tensors nobody knows that they were written to: a plan keeps no copies of theirs."""
    layout = GistLayout.stack([GistLayout.from_segments([7, 6], 3, tail=9)] * 2).last_rows(10)
    assert not layout.gist_begin.is_contiguous()
    q, k = torch.randn(2, 2, 10, 16), torch.randn(2, 2, layout.num_local, 16)
    before = gist_attention(q, k, k, layout)
    layout.gist_begin.copy_(layout.gist_end)
    after = gist_attention(q, k, k, layout)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, gist_attention(q, k, k, layout, backend="reference"))


def test_a_captured_graph_takes_no_copies_of_vectors_from_a_plan(monkeypatch):
    """It reads the layout's vectors at every replay, whatever was written to them since."""
    layout = GistLayout.stack([GistLayout.from_segments([7, 6], 3, tail=9)] * 2)
    k, plans = torch.randn(2, 2, layout.num_rows, 16), []
    for one in (layout, layout.last_rows(10)):
        gist_attention(k[:, :, -one.num_rows :], k, k, one)
        plans.append(one.__dict__["_plan"])
    assert [plan.may_be_stale() for plan in plans] == [False, False]
    on_device = type("Vector", (), {"is_cuda": True})()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for plan in plans:
        plan.vectors = on_device, *plan.vectors[1:]
    assert [plan.may_be_stale() for plan in plans] == [False, True]


@pytest.mark.parametrize("past", [0, 4])
def test_rows_of_what_does_not_learn_keep_no_graph(past):
    """A cache holds them for longer than the call whose graph they would hold: only queries or sinks may learn."""
    layout = GistLayout.from_segments([7, 5], 2, tail=3, past=past)
    inputs = make_inputs(layout, head_dim=16, dtype=torch.float32)
    given = [None if t is None else t.detach() for t in (inputs.q, inputs.k, inputs.v, inputs.past_key)]
    for learns, expected in ((0, False), (1, True), (2, True), *(((3, True),) if past else ())):
        leaves = [t if t is None or i != learns else t.clone().requires_grad_() for i, t in enumerate(given)]
        past_value = None if inputs.past_value is None else inputs.past_value.detach()
        out, _, gist_k, gist_v = attended([*leaves, past_value], layout, "auto")
        assert out.requires_grad
        assert gist_k.requires_grad == gist_v.requires_grad == expected


def test_a_backward_refuses_tangents():
    layout = GistLayout.from_segments([5], 2, tail=2)
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    out = gist_attention(q, q, q, layout)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        torch.autograd.grad(out, q, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


def test_who_looks_at_operators_sees_them():
    layout = GistLayout.from_segments([5], 2, tail=2)
    q, k, v = (torch.randn(1, 2, 9, 16, requires_grad=True) for _ in range(3))
    expected = gist_attention(q, k, v, layout)
    with Operators() as seen:
        assert torch.equal(gist_attention(q, k, v, layout), expected)
    assert {"gistkern::compact", "gistkern::attention"} <= set(seen.names)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(q.detach())
        assert gist_attention(fake, fake, fake, layout).shape == q.shape
    with pytest.raises(RuntimeError, match="setup_context"):  # torch.library's word; a gradient would be missing
        torch.func.vjp(lambda k: gist_attention(q.detach(), k, v.detach(), layout), k.detach())

    class Marked(torch.Tensor):
        pass

    assert torch.equal(gist_attention(q.detach().as_subclass(Marked), k, v, layout), expected)


@pytest.mark.parametrize("backend", ON_CPU)
def test_saved_tensors_may_come_back_otherwise(backend):
    """Offloaded ones are contiguous afterwards, and checkpoints run the forward again."""
    layout = good_layout()
    inputs = make_inputs(layout, head_dim=16, dtype=torch.float32)
    strided = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)]

    def gradients(run):
        leaves = [t.clone().requires_grad_() for t in strided]
        return torch.autograd.grad(run(leaves), leaves, inputs.grad_out)

    def call(q, k, v):
        return gist_attention(q, k, v, layout, backend=backend)

    def offloaded(leaves):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
            return call(*leaves)

    expected = gradients(lambda leaves: call(*leaves))
    for run in (
        offloaded,
        lambda leaves: checkpoint(call, *leaves, use_reentrant=False),
    ):
        for one, other in zip(gradients(run), expected, strict=True):
            assert torch.equal(one, other)
