"""No pool, page or tail is left: the same ValueError on every backend, eager and compiled, public and operator."""

import contextlib

import pytest
import torch
from pool_cases import make_case

from gistkern import KeyValueRows, backends, gist_compact, gist_decode
from gistkern.ops import decode_library

BACKENDS = [name for name in ("cpu", "sdpa", "reference") if backends.get(name).missing() is None]
SAYS_WHAT = "must|nothing|one device|alike|takes|make them"


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


def pool_call(**options):
    case = make_case(**options)
    return {name: value for name, value in vars(case).items() if value is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, lambda c: {"gist_end": c["gist_end"] + 100}, "rows of the pool"),
        ({}, lambda c: {"gist_capacity": 36}, "gist_capacity is 36, but a sequence sees 37 rows"),
        ({}, lambda c: {"tail_length": c["tail_length"] + 100}, "tail_length must lie in"),
        ({"page_size": 4}, lambda c: {"page_table": c["page_table"] + 100}, "page_table must name pages"),
        ({"page_size": 4}, lambda c: {"page_table": c["page_table"] - 100}, "page_table must name pages"),
        ({"rows": 2, "per_row": True}, lambda c: {"local_begin": c["local_begin"] - 9}, "must not be negative"),
    ],
)
def test_decoding_refuses(options, change, message, compiled, backend):
    call = pool_call(**options)

    def step(q, gist, tail, **rest):
        return gist_decode(q, gist, tail, **rest, backend=backend)[0]

    step = torch.compile(step, backend="eager", fullgraph=True) if compiled else step
    step(**call)
    with pytest.raises(ValueError, match=message):
        step(**call | change(call))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("gather", "slot", "message"),
    [
        ([[1]], [[10**7]], "slot must list"),
        ([[1]], [[-2]], "slot must list"),
        ([[9]], [[0]], "gather must list"),
        ([[-(10**9)]], [[0]], "gather must list"),
        ([[0, 1]], [[3, 3]], "names one twice"),
    ],
)
def test_writing_into_a_pool_refuses_and_writes_nothing(gather, slot, message, compiled, backend):
    k, key, value = torch.randn(1, 2, 9, 16), torch.zeros(10, 2, 16), torch.zeros(10, 2, 16)

    def write(k, gather, slot, key, value):
        gist_compact(k, k, gather, slot, KeyValueRows(key, value), backend=backend)

    write = torch.compile(write, backend="eager", fullgraph=True) if compiled else write
    write(k, torch.tensor([[1]]), torch.tensor([[4]]), key, value)
    before = key.clone()
    with pytest.raises(ValueError, match=message):
        write(k, torch.tensor(gather), torch.tensor(slot), key, value)
    assert torch.equal(key, before)


def test_a_pool_that_cannot_be_written_is_refused():
    k, index = torch.randn(1, 2, 9, 16), torch.tensor([[1]])
    shared = torch.zeros(1, 2, 16).expand(10, -1, -1)
    one = torch.zeros(10, 2, 16)
    for pool, message in (
        (KeyValueRows(shared, shared.clone().expand(10, -1, -1)), "strides"),
        (KeyValueRows(shared, shared[:1].clone().expand(10, -1, -1)), "share memory"),
        (KeyValueRows(one, one), "lie apart"),
        (KeyValueRows(one[1:], one[:-1]), "lie apart"),
        (KeyValueRows(one[:, :1], one[:, 1:]), None),
    ):
        k = torch.randn(1, pool.key.shape[1], 9, 16)
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            gist_compact(k, k, index, index, pool)
        for backend in BACKENDS:  # what a compiled call runs
            with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
                decode_library.compact(k, k, index, index, pool.key, pool.value, None, None, backend)


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("begin", [40, 2**31 - 1])
def test_a_row_that_sees_no_tail_row_may_say_so_with_any_number(begin, page_size):
    call = pool_call(page_size=page_size)
    call["local_begin"] = torch.full((len(call["q"]),), begin, dtype=torch.int32)
    (out, lse), *others = (gist_decode(**call, backend=backend) for backend in BACKENDS)
    for one, other in others:
        torch.testing.assert_close(one, out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other, lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pool_operators_refuse_too(backend):
    case = make_case()
    spread = [t[:, None] for t in (case.gist_begin, case.gist_end)]
    arguments = [
        *(case.q, case.gist.key, case.gist.value, None, None, *spread, case.tail.key, case.tail.value, None, None),
        *(case.tail_length, None, None, 40, 0.2, backend),
    ]
    decode_library.decode(*arguments)
    nine = torch.zeros(4, 4, 9, 32)
    for place, bad in (
        (0, nine),
        (5, spread[0].long()),
        (5, spread[0][:2]),
        (1, case.gist.key[:, :0]),
        (14, -1),
        (3, torch.zeros(59, 2)),
        (1, case.gist.key.to("meta")),
        (15, 1e-60),
        (11, spread[0]),
    ):
        with pytest.raises(ValueError, match=SAYS_WHAT):
            decode_library.decode(*arguments[:place], bad, *arguments[place + 1 :])
    rows, index = torch.zeros(1, 2, 9, 16), torch.tensor([[1]])
    for pool in (torch.zeros(5, 2, 8), torch.zeros(5, 3, 16), torch.zeros(5, 2, 16, dtype=torch.float16)):
        with pytest.raises(ValueError, match=SAYS_WHAT):
            decode_library.compact(rows, rows, index, index, pool, pool.clone(), None, None, backend)
