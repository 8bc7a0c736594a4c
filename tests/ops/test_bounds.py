"""No input reaches outside a buffer: one ValueError on every backend, eager and compiled, public and operator."""

import copy
from dataclasses import replace

import pytest
import torch

from gistkern import GistLayout, KeyValueRows, backends, gist_attention, gist_decode
from gistkern.backends import sdpa
from gistkern.layout.checks import check_intervals, check_kept
from gistkern.ops import library
from gistkern.testing import compare, make_inputs

BACKENDS = [name for name in ("cpu", "sdpa", "reference") if backends.get(name).missing() is None]
FAR = 10**9
SAYS_WHAT = "must|needs|nothing|one device|has fewer|alike|takes|go together|make them|are floats"


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


def segments():
    return GistLayout.from_segments([6, 4], gists=2, tail=3)


def decoding():
    return GistLayout.decode(5, 3, rows=2)


def moved(name, by):
    """Every way to a layout whose vector `name` is off by `by`."""

    def replaced(layout):
        return replace(layout, **{name: getattr(layout, name) + by})

    def mutated(layout):
        getattr(layout, name).add_(by)
        return layout

    def mutated_through_numpy(layout):  # torch's version counters do not see it
        getattr(layout, name).numpy()[...] += by
        return layout

    def last(layout):
        return mutated(layout).last_rows(layout.num_rows)

    def copied(layout):
        return copy.deepcopy(mutated(layout))

    return [replaced, mutated, mutated_through_numpy, last, copied]


BROKEN = [
    ("gist_end", FAR, segments),
    ("gist_end", 1, segments),
    ("gist_begin", -1, segments),
    ("gist_begin", -FAR, decoding),
    ("gist_end", 1, decoding),
    ("local_begin", -1, segments),
    ("local_begin", 2, segments),
    ("local_begin", -FAR, decoding),
    ("gather", -(10**4), segments),
    ("gather", 10**12, segments),
]
CASES = [(break_it, make) for name, by, make in BROKEN for break_it in moved(name, by)]
IDS = [f"{make.__name__}-{name}{by:+}-{how.__name__}" for name, by, make in BROKEN for how in moved(name, by)]


def attend(layout, backend, inputs=None):
    x = inputs or make_inputs(layout, head_dim=16)
    return gist_attention(x.q, x.k, x.v, layout, past_key=x.past_key, past_value=x.past_value, backend=backend)


@pytest.mark.parametrize(("break_it", "make"), CASES, ids=IDS)
def test_a_layout_that_leaves_its_buffers_is_the_same_error_everywhere(break_it, make):
    messages = set()
    for backend in BACKENDS:
        layout = make()
        inputs = make_inputs(layout, head_dim=16)
        attend(layout, backend, inputs)  # so that what is remembered of a good layout does not hide what became of it
        bad = break_it(layout)
        with pytest.raises(ValueError, match="invalid GistLayout") as raised:
            attend(bad, backend, inputs)
        messages.add(str(raised.value))
        for use in (bad.dense, bad.token_mask, bad.picture):
            with pytest.raises(ValueError, match="invalid GistLayout"):
                use()
    assert len(messages) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_calls_raise_the_same(backend):
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    inputs = make_inputs(segments(), head_dim=16)
    torch.testing.assert_close(compiled(segments(), backend, inputs), attend(segments(), backend, inputs))
    for name, by in (("gist_end", FAR), ("local_begin", -1), ("gather", -(10**4)), ("gather", FAR)):
        for break_it in moved(name, by)[:2]:
            with pytest.raises(ValueError, match="invalid GistLayout"):
                compiled(break_it(segments()), backend, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layout_changed_between_forward_and_backward_is_an_error(backend):
    for change, error in ((moved("gist_end", FAR)[1], RuntimeError), (moved("gist_end", FAR)[2], ValueError)):
        layout = segments()
        inputs = make_inputs(layout, head_dim=16)
        out = attend(layout, backend, inputs)
        change(layout)
        with pytest.raises(error, match=r"modified by an inplace operation|invalid GistLayout"):
            torch.autograd.grad(out, inputs.k, inputs.grad_out)


def test_layouts_made_of_a_broken_one_are_broken():
    broken = moved("gist_end", FAR)[1](segments())
    for made in (GistLayout.pack([segments(), broken]), GistLayout.stack([broken, segments()]), broken.closed()):
        with pytest.raises(ValueError, match="invalid GistLayout"):
            attend(made, BACKENDS[0])


def test_what_is_remembered_belongs_to_these_tensors():
    """A layout by construction is not read again; a replaced vector or another buffer is."""
    layout = segments()
    check_intervals(layout)
    for changed in (
        replace(layout, tail=1),  # the rows then stand elsewhere
        replace(layout, gather=torch.full_like(layout.gather, -1)),
        replace(layout, gather=torch.zeros_like(layout.gather)),
    ):
        with pytest.raises(ValueError, match=r"k must be|unfilled|twice|both"):
            attend(changed, BACKENDS[0], make_inputs(layout, head_dim=16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_begin": torch.tensor([-1])}, "keep_begin"),
        ({"keep_end": torch.tensor([10**12])}, "keep_end <= 5"),
        ({"keep_local": torch.tensor([18])}, r"keep_local must lie in 0\.\.17"),
    ],
)
def test_what_a_cache_would_keep_is_there(changes, message):
    check_kept(segments())
    with pytest.raises(ValueError, match=message):
        check_kept(replace(segments(), **changes))


def raw_call():
    layout = GistLayout.from_segments([6], gists=2, tail=3)
    x = make_inputs(layout, head_dim=16)
    gist = torch.randn(1, 2, 3, 16)
    return {
        **{"q": x.q.detach(), "k": x.k.detach(), "v": x.v.detach(), "gist_k": gist, "gist_v": gist},
        **{"gist_begin": layout.gist_begin, "gist_end": layout.gist_end, "local_begin": layout.local_begin},
        "scale": 0.25,
    }


HOSTILE = {
    "short vector": lambda c: {"gist_end": c["gist_end"][:, :1]},
    "int64 vector": lambda c: {"gist_begin": c["gist_begin"].long()},
    "gist_end": lambda c: {"gist_end": c["gist_end"] + 4},
    "gist_begin": lambda c: {"gist_begin": c["gist_begin"] - 1},
    "local_begin": lambda c: {"local_begin": c["local_begin"] + 9},
    "int32 minimum": lambda c: {"local_begin": torch.full_like(c["local_begin"], -(2**31))},
    "no key heads": lambda c: {n: c[n][:, :0] for n in ("k", "v", "gist_k", "gist_v")},
    "no query heads": lambda c: {"q": c["q"][:, :0]},
    "no samples": lambda c: {n: t[:0] for n, t in c.items() if torch.is_tensor(t)},
    "no rows": lambda c: {"q": c["q"][:, :, :0]},
    "no elements": lambda c: {n: t[..., :0] for n, t in c.items() if torch.is_tensor(t) and t.dim() == 4},
    "head group": lambda c: {"q": c["q"][:, :3]},
    "fewer keys than queries": lambda c: {n: c[n][:, :, :1] for n in "kv"},
    "other values": lambda c: {"v": c["v"][:, :, :5]},
    "other gist values": lambda c: {"gist_v": c["gist_v"][:, :, :1]},
    "three dimensions": lambda c: {"k": c["k"][0]},
    "scalar": lambda c: {"gist_k": torch.zeros(())},
    "half keys": lambda c: {"k": c["k"].half()},
    "meta keys": lambda c: {"k": c["k"].to("meta")},
    "meta vector": lambda c: {"gist_end": c["gist_end"].to("meta")},
    "2^31 rows": lambda c: {n: c[n][:, :, :1].expand(-1, -1, 2**31, -1) for n in "kv"},
    "2^31 gist rows": lambda c: {n: c[n][:, :, :1].expand(-1, -1, 2**31, -1) for n in ("gist_k", "gist_v")},
    "tiny scale": lambda c: {"scale": 1e-50},
    "huge scale": lambda c: {"scale": 1e39},
    "NaN scale": lambda c: {"scale": float("nan")},
    "negative scale": lambda c: {"scale": -1.0},
}


@pytest.mark.parametrize("rows", [9, 2], ids=["forward", "decode"])
@pytest.mark.parametrize("name", HOSTILE)
def test_the_operator_refuses(name, rows):
    call = raw_call()
    if rows == 2:  # few enough for the decode kernel
        call |= {
            n: t[:, :, -2:] if n == "q" else t[:, -2:]
            for n, t in call.items()
            if n[:4] in ("q", "gist", "loca") and n not in ("gist_k", "gist_v")
        }
    good = [library.attention(*call.values(), backend) for backend in BACKENDS]
    torch.testing.assert_close(good[0], good[-1])
    out, lse = good[0]
    bad = list((call | HOSTILE[name](call)).values())
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=SAYS_WHAT):
            library.attention(*bad, backend)
        with pytest.raises(ValueError, match=SAYS_WHAT):
            library.attention_backward(torch.ones_like(out), *bad[:5], out, lse, *bad[5:], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_refuses_what_its_forward_did_not_make(backend):
    call = raw_call()
    out, lse = library.attention(*call.values(), backend)
    tensors, rest = list(call.values())[:5], list(call.values())[5:]
    for grad, result, sums in ((out[:, :, 1:], out, lse), (out, out[:, :2], lse), (out, out, lse.double())):
        with pytest.raises(ValueError, match=r"grad_out must be|out must be|lse must be"):
            library.attention_backward(grad, *tensors, result, sums, *rest, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        {"gather": torch.tensor([[0, 9]])},
        {"gather": torch.tensor([[0, -2]])},
        {"gather": torch.tensor([[0, 2**62]])},
        {"gather": torch.tensor([[0], [0]])},
        {"gather": torch.tensor([[0, 1]], dtype=torch.int32)},
        {"v": torch.zeros(1, 2, 8, 16)},
        {"past_k": torch.zeros(1, 2, 4, 16)},
        {"past_k": torch.zeros(1, 2, 4, 8), "past_v": torch.zeros(1, 2, 4, 8)},
        {"k": torch.zeros(2, 9, 16)},
    ],
    ids=lambda change: "-".join(change),
)
def test_compaction_refuses(change, backend):
    call = {"k": torch.zeros(1, 2, 9, 16), "v": torch.zeros(1, 2, 9, 16), "past_k": None, "past_v": None}
    call |= {"gather": torch.tensor([[0, 8]])} | change
    with pytest.raises(ValueError, match=SAYS_WHAT):
        library.compact(*call.values(), backend)
    if "gather" in change:
        gradient = torch.zeros(1, 2, 2, 16)
        with pytest.raises(ValueError, match=SAYS_WHAT):
            library.compact_backward(gradient, gradient, change["gather"], 9, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_transposed_inputs_give_the_same(backend):
    layout = segments()
    x = make_inputs(layout, head_dim=16)
    one = x.k.detach()[:, :1]
    views = one.expand(-1, 2, -1, -1), x.v.detach().transpose(2, 3).contiguous().transpose(2, 3)
    plain = [t.contiguous() for t in views]
    torch.testing.assert_close(
        gist_attention(x.q.detach(), *views, layout, backend=backend),
        gist_attention(x.q.detach(), *plain, layout, backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_maps_over_calls(backend):
    """By torch's loop: no batching rule is written, none is needed for the right answer."""
    layout = segments()
    q, k = torch.randn(3, 1, 4, layout.num_rows, 16), torch.randn(3, 1, 2, layout.num_rows, 16)
    mapped = torch.vmap(lambda q, k: gist_attention(q, k, k, layout, backend=backend))(q, k)
    alone = torch.stack([gist_attention(*pair, pair[1], layout, backend=backend) for pair in zip(q, k, strict=True)])
    torch.testing.assert_close(mapped, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_torch_whose_flash_kernel_knows_no_groups_gets_a_key_head_for_each_query_head(dtype, monkeypatch):
    """Before torch 2.9 grouped heads gave NaN, and their backward wrote over other memory."""
    seen = []

    def recorded(kernel, places):
        def call(*arguments, **options):
            seen.append({arguments[place].shape[1] for place in places})
            return kernel(*arguments, **options)

        return call

    monkeypatch.setattr(sdpa, "_TAKES_GROUPS", False)
    monkeypatch.setattr(sdpa, "_flash", recorded(sdpa._flash, (0, 1, 2)))
    monkeypatch.setattr(sdpa, "_flash_backward", recorded(sdpa._flash_backward, (0, 1, 2, 3)))
    for layout in (GistLayout.from_segments([40, 40, 9], 3, tail=5), GistLayout.sliding(90, 30, 8), decoding()):
        compare(make_inputs(layout, heads=6, kv_heads=2, dtype=dtype), layout, "sdpa")
    assert seen
    assert all(heads == {6} for heads in seen)


def test_forward_mode_is_refused():
    """Its tangent would be zero without a word."""
    layout = segments()
    q, k = torch.randn(1, 4, layout.num_rows, 16), torch.randn(1, 2, layout.num_rows, 16)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda q: gist_attention(q, k, k, layout), (q,), (q,))


@pytest.mark.parametrize(
    "change", [torch.Tensor.tolist, torch.Tensor.to_sparse, lambda q: torch.nested.nested_tensor(list(q))]
)
def test_what_is_no_dense_tensor_is_said_so(change):
    layout = segments()
    q = torch.randn(layout.batch_size, 2, layout.num_rows, 16)
    with pytest.raises((TypeError, ValueError), match=r"q must be a (dense )?tensor"):
        gist_attention(change(q), q, q, layout)
    begin = torch.zeros(1, dtype=torch.int32)
    rows = KeyValueRows(*torch.randn(2, 1, 2, 5, 16))
    with pytest.raises(TypeError, match="gist_end must be a tensor"):
        gist_decode(q[:, :, :1], KeyValueRows(*torch.randn(2, 5, 2, 16)), rows, gist_begin=begin, gist_end=[5])
