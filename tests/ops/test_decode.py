"""Pooled, paged and quantized decoding on CPU against an oracle that collects every row's keys one by one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool_cases import CASES, E4M3, INT8, check, int32, make_case

from gistkern import KeyValueRows, backends, gist_compact, gist_decode
from gistkern.ops import decode_library
from gistkern.rows import dequantize, quantize

NATIVE = backends.get("cpu").missing() is None
SERVING = ["cpu", "sdpa"] if NATIVE else ["sdpa"]


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees_with_the_oracle(name, dtype, backend):
    check(make_case(**CASES[name], dtype=dtype), backend)


@st.composite
def pool_options(draw):
    documents = draw(st.lists(st.integers(0, 70), min_size=1, max_size=4))
    sequence = st.tuples(st.integers(0, len(documents) - 1), st.integers(0, 40))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "documents": tuple(documents),
        "sequences": tuple(draw(st.lists(sequence, min_size=1, max_size=5))),
        "rows": draw(st.integers(1, 8)),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 5])),
        "head_dim": draw(st.sampled_from([5, 16, 40, 64, 128])),
        "gist_dtype": draw(st.sampled_from([None, INT8, E4M3])),
        "tail_dtype": draw(st.sampled_from([None, INT8, E4M3])),
        "page_size": draw(st.sampled_from([None, 1, 7, 16])),
        "per_row": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(pool_options(), st.sampled_from(SERVING))
def test_any_pool_agrees_with_the_oracle(options, backend):
    check(make_case(**options), backend)


def test_sequences_that_share_a_document_get_what_they_would_get_alone():
    case = make_case((50,), ((0, 3), (0, 3)), rows=2)
    q = case.q.clone()
    q[1] = q[0]
    tail = KeyValueRows(*(t[:1].expand(2, -1, -1, -1) for t in (case.tail.key, case.tail.value)))
    out, lse = gist_decode(q, case.gist, tail, gist_begin=case.gist_begin, gist_end=case.gist_end)
    torch.testing.assert_close(out[0], out[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[0], lse[1], rtol=1e-6, atol=1e-6)


def test_partial_results_merge_by_their_lse():
    """Gists alone and tail alone, merged as docs/concepts/numerics.md says, equal both at once."""
    case = make_case(rows=2)
    whole, whole_lse = case.call("auto")
    nothing = torch.zeros_like(case.gist_begin)
    arguments = {"gist_begin": case.gist_begin, "gist_end": case.gist_end, "tail_length": case.tail_length}
    gists, gists_lse = gist_decode(case.q, case.gist, case.tail, **arguments | {"tail_length": nothing})
    tails, tails_lse = gist_decode(case.q, case.gist, case.tail, **arguments | {"gist_end": case.gist_begin})
    assert gists_lse[3].eq(-torch.inf).all(), "the empty document's sequence sees nothing without its tail"
    joint = torch.logaddexp(gists_lse, tails_lse)
    merged = gists * (gists_lse - joint).exp()[..., None] + tails * (tails_lse - joint).exp()[..., None]
    torch.testing.assert_close(joint, whole_lse)
    torch.testing.assert_close(merged, whole)


@pytest.mark.parametrize("backend", SERVING)
def test_two_runs_are_bit_identical(backend):
    case = make_case(**CASES["split"])
    assert all(torch.equal(a, b) for a, b in zip(case.call(backend), case.call(backend), strict=True))


@pytest.mark.parametrize("backend", SERVING)
@pytest.mark.parametrize("pool_dtype", [torch.float32, INT8, E4M3], ids=str)
def test_compaction_fills_the_named_rows_and_no_others(pool_dtype, backend):
    k, v = torch.randn(2, 2, 3, 9, 24)
    k[0, 1, 7] = 0.0  # a row of zeros has scale 0
    pool = KeyValueRows.empty(12, kv_heads=3, head_dim=24, dtype=pool_dtype)
    before = [t.clone() for t in pool.tensors()]
    gather = torch.tensor([[7, 8, -1, 2], [0, 0, 1, 8]])
    slot = torch.tensor([[3, 11, 5, -1], [0, 1, 2, 10]])
    gist_compact(k, v, gather, slot, pool, backend=backend)
    written = {3: (0, 7), 11: (0, 8), 0: (1, 0), 1: (1, 0), 2: (1, 1), 10: (1, 8)}
    for row in range(12):
        for now, then in zip(pool.tensors(), before, strict=True):
            same = torch.equal(now[row].view(torch.uint8), then[row].view(torch.uint8))
            assert same == (row not in written), f"row {row}"
    for row, (sample, token) in written.items():
        for source, rows, scale in ((k, pool.key, pool.key_scale), (v, pool.value, pool.value_scale)):
            exact = source[sample, :, token]
            if scale is None:
                assert torch.equal(rows[row], exact)
                continue
            elements, scales = quantize(exact, pool_dtype)
            assert torch.equal(rows[row].float(), elements.float())
            assert torch.equal(scale[row], scales)


@pytest.mark.parametrize("dtype", [INT8, E4M3], ids=str)
def test_quantization_errs_by_half_a_step(dtype):
    rows = torch.randn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    elements, scale = quantize(rows, dtype)
    error = (dequantize(elements, scale, torch.float32) - rows).abs()
    largest = rows.abs().amax(-1, keepdim=True)
    # int8: half of largest / 127; e4m3: half a unit in the last of four significand bits, or of the smallest subnormal
    bound = largest / 254 if dtype == INT8 else torch.maximum(rows.abs() / 16, largest / 448 * 2**-10)
    assert (error <= bound * 1.0001).all()
    assert elements.float().abs().amax(-1).eq(127 if dtype == INT8 else 448).all()


def test_opcheck():
    case = make_case(rows=2, page_size=4, gist_dtype=INT8)
    gist, tail = case.gist, case.tail
    begin, end = (t[:, None].expand(-1, 2) for t in (case.gist_begin, case.gist_end))
    for backend in SERVING:
        arguments = (
            *(case.q, gist.key, gist.value, gist.key_scale, gist.value_scale, begin, end),
            *(tail.key, tail.value, None, None, case.tail_length, None, case.page_table, 40, 0.2, backend),
        )
        torch.library.opcheck(decode_library.decode, arguments)
        pool = KeyValueRows.empty(5, kv_heads=2, head_dim=8, dtype=torch.float32)
        rows = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
        index = torch.tensor([[1, 3]])
        torch.library.opcheck(decode_library.compact, (*rows, index, index, pool.key, pool.value, None, None, backend))


def test_compiles_as_one_graph():
    case = make_case()
    arguments = {"gist_begin": case.gist_begin, "gist_end": case.gist_end, "tail_length": case.tail_length}

    def step(q, gist_k, gist_v, tail_k, tail_v):
        rows = KeyValueRows(gist_k, gist_v), KeyValueRows(tail_k, tail_v)
        return gist_decode(q * 2, *rows, **arguments)[0]

    tensors = (case.q, case.gist.key, case.gist.value, case.tail.key, case.tail.value)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), step(*tensors))


def with_gradient(rows):
    return KeyValueRows(rows.key.clone().requires_grad_(), rows.value)


def test_a_page_that_is_not_there_is_an_error():
    case = make_case(page_size=4)
    case.page_table[1, 0] = 1000
    with pytest.raises(ValueError, match=r"page_table must name pages 0\.\.25 wherever a sequence has rows"):
        case.call("auto")


@pytest.mark.parametrize("backend", SERVING)
def test_strides_of_the_vectors_do_not_matter(backend):
    case = make_case(rows=2)
    spread = {
        name: torch.stack([getattr(case, name), torch.full_like(case.tail_length, 7)], 1)[:, 0]
        for name in ("tail_length", "gist_begin", "gist_end")
    }
    assert not spread["tail_length"].is_contiguous()
    for ours, plain in zip(replace(case, **spread).call(backend), case.call(backend), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("backend", SERVING)
def test_nan_in_a_row_that_is_seen_shows(backend):
    """In a split beside others, too: the merge must not take the row for an empty one."""
    case = make_case((2600,), ((0, 4),), heads=2, kv_heads=1)
    case.gist.key[int(case.gist_end[0]) - 1] = torch.nan
    out, lse = case.call(backend)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("backend", SERVING)
def test_quantizing_keeps_nan(backend):
    k = torch.randn(1, 2, 3, 8)
    k[0, 0, 1, 2] = torch.nan
    pool = KeyValueRows.empty(3, kv_heads=2, head_dim=8, dtype=INT8)
    index = torch.tensor([[0, 1, 2]])
    gist_compact(k, k, index, index, pool, backend=backend)
    assert pool.key_scale.isnan().nonzero().tolist() == [[1, 0]]


def good_call():
    case = make_case()
    return {name: value for name, value in vars(case).items() if value is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"q": torch.zeros(4, 4, 9, 32)}, r"1\.\.8 rows"),
        (lambda c: {"q": c["q"][:, :3]}, "multiple of the pool's key/value heads"),
        (lambda c: {"q": c["q"].requires_grad_()}, "has no gradient"),
        (lambda c: {"tail": with_gradient(c["tail"])}, "has no gradient"),
        (lambda c: {"q": c["q"][:0]}, "0 sequences of 4 heads"),
        (lambda c: {"q": c["q"].double()}, "takes float16, bfloat16 or float32 queries, got torch.float64"),
        (lambda c: {"gist_end": c["gist_end"] + 100}, r"must lie in 0\.\.59, the rows of the pool"),
        (lambda c: {"tail_length": c["tail_length"] + 100}, r"tail_length must lie in 0\.\.21"),
        (lambda c: {"local_begin": -c["tail_length"]}, "local_begin must not be negative"),
        (lambda c: {"q": c["q"].half()}, "gist is torch.float32, q torch.float16"),
        (lambda c: {"gist": c["tail"]}, r"gist must be a pool \[rows, kv_heads, 32\]"),
        (lambda c: {"tail": c["gist"]}, r"tail must be \[4, 2, rows, 32\]"),
        (lambda c: {"page_table": int32([[0], [1], [2], [3]])}, "tail must be pages"),
        (lambda c: {"gist_begin": c["gist_begin"].long()}, "gist_begin must be torch.int32"),
        (lambda c: {"gist_end": c["gist_end"][:2]}, r"of shape \(4,\) or \(4, 1\)"),
        (lambda c: {"tail_length": c["tail_length"][:2]}, r"tail_length must be torch.int32 of shape \(4,\)"),
        (lambda c: {"gist_begin": c["gist_begin"].to("meta")}, "tensors are on cpu and meta"),
        (lambda c: {"scale": -1.0}, "scale must be a positive number"),
        (lambda c: {"gist_capacity": -1}, "gist_capacity must not be negative"),
        (lambda c: {"backend": "quick"}, "unknown backend 'quick'"),
    ],
)
def test_bad_decode_calls_say_what_is_wrong(change, message):
    call = good_call()
    call |= change(call)
    with pytest.raises(ValueError, match=message):
        gist_decode(call.pop("q"), call.pop("gist"), call.pop("tail"), **call)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.zeros(3, 2, 8), torch.zeros(3, 2, 9)), "key and value must be alike"),
        ((torch.zeros(3, 2, 8).to(INT8),) * 2, r"torch.int8 needs fp32 scales, got key_scale=None"),
        ((torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), torch.zeros(3, 2)), "takes no scales"),
        ((*(torch.zeros(3, 2, 8).to(INT8),) * 2, torch.zeros(3), torch.zeros(3, 2)), r"of shape \(3, 2\), got"),
    ],
)
def test_bad_rows_say_what_is_wrong(tensors, message):
    with pytest.raises(ValueError, match=message):
        KeyValueRows(*tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 2, 4, 9)}, "k and v must be alike"),
        ({"gather": torch.zeros(1, 2, dtype=torch.int32)}, "gather must be torch.int64"),
        ({"slot": torch.zeros(1, 3, dtype=torch.int64)}, "gather and slot of one shape"),
        ({"k": torch.zeros(1, 2, 4, 8, requires_grad=True)}, "gist_compact has no gradient"),
        ({"slot": torch.full((1, 2), 5)}, r"slot must list rows 0\.\.4 of the pool, or -1"),
        ({"gather": torch.full((1, 2), 4)}, r"gather must list rows 0\.\.3 of k and v, or -1"),
        ({"pool": KeyValueRows(*torch.zeros(2, 5, 8, 2).transpose(2, 3))}, "the pool's rows must be contiguous"),
        ({"pool": KeyValueRows(torch.zeros(5, 2, 8), torch.zeros(2, 5, 8).transpose(0, 1))}, "lie alike in memory"),
        ({"pool": KeyValueRows.empty(5, kv_heads=1, head_dim=8)}, r"the pool must be \[rows, 2, 8\]"),
        ({"pool": KeyValueRows.empty(5, kv_heads=2, head_dim=8)}, "the pool is torch.bfloat16, k torch.float32"),
    ],
)
def test_bad_compaction_calls_say_what_is_wrong(change, message):
    index = torch.zeros(1, 2, dtype=torch.int64)
    pool = KeyValueRows.empty(5, kv_heads=2, head_dim=8, dtype=torch.float32)
    call = {"k": torch.zeros(1, 2, 4, 8), "v": torch.zeros(1, 2, 4, 8), "gather": index, "slot": index, "pool": pool}
    with pytest.raises(ValueError, match=message):
        gist_compact(**call | change)
