"""What a compression costs the host: exact counts beside a plain prefill, and no wait for the device."""

import copy

import pytest
import torch
import transformers
from conftest import make_model, random_ids
from packaging.version import Version

import gistkern
from bench.measured.calls import Operations, count
from gistkern.backends import native
from gistkern.layout.streams import left_padded

SEGMENT = 16
# an older transformers calls less by itself, and without the extension attention is many operators
COMPARABLE = native.missing() is None and Version(transformers.__version__) >= Version("5.24")


@pytest.fixture(autouse=True)
def calls_of_two_segments(monkeypatch):
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: 2 * SEGMENT)


def operations(function):
    """Of a second call: the first looks at the settings of the gist rows, once."""
    function()
    with Operations() as found, torch.no_grad():
        function()
    return found


@pytest.mark.parametrize("summary", [0, 2], ids=["segments", "hierarchical"])
@pytest.mark.parametrize("lengths", [(100,), (100, 100), (100, 37, 3)], ids=["one", "alike", "ragged"])
def test_nothing_waits_for_the_device(summary, lengths):
    """Of tensors on the host as well, where a device's would be: planning asks none for a value."""
    model = make_model()
    gistkern.patch(model, num_gist_tokens=2, num_segment_gist_tokens=summary)
    context = [random_ids(1, count, count)[0].tolist() for count in lengths]
    found = operations(lambda: gistkern.compress(model, context, segment_length=SEGMENT))
    assert found.total
    assert not found.waits


def test_a_mask_is_looked_at_before_the_first_call():
    model = make_model()
    handle = gistkern.patch(model, num_gist_tokens=2)
    ids, mask = left_padded([random_ids(1, count, count)[0] for count in (100, 37)])
    before = []

    def first(module, args, kwargs):
        before.append(sum(found.waits.values()))

    with handle.inner.register_forward_pre_hook(first, with_kwargs=True), Operations() as found:
        gistkern.compress(model, ids, mask, segment_length=SEGMENT)
    assert len(before) == 4
    assert set(before) == {sum(found.waits.values())}


@pytest.mark.parametrize("layers", [2, 4])
def test_a_call_costs_what_a_prefill_costs(layers):
    """In operations: each further call 1.05 times a prefill's at most, all of a context of one call 1.3 times."""
    plain = make_model(dtype=torch.float32, num_hidden_layers=layers)
    model = copy.deepcopy(plain)
    gistkern.patch(model, num_gist_tokens=2)

    def compressed(calls):
        ids = random_ids(1, 2 * SEGMENT * calls)
        return operations(lambda: gistkern.compress(model, ids, segment_length=SEGMENT)).total

    prefill = operations(lambda: plain.model(random_ids(1, 2 * SEGMENT), use_cache=True)).total
    one, two, four, six = map(compressed, (1, 2, 4, 6))
    assert six - four == four - two, "each call costs the same"
    assert six - two <= 4 * 1.05 * prefill
    assert one <= 1.3 * prefill


def calls_of(function):
    """Python and C calls of the third time: what is remembered from one time to the next is by then."""
    function(), function()
    with torch.no_grad():
        return sum(count(function))


@pytest.mark.parametrize("layers", [2, 4])
def test_the_host_calls_what_it_calls_for_a_prefill(layers):
    """In Python and C: a further call 1.05 times a prefill of its tokens at most, however long segments are."""
    plain = make_model(dtype=torch.float32, num_hidden_layers=layers)
    model = copy.deepcopy(plain)
    gistkern.patch(model, num_gist_tokens=2)

    def compressed(calls, segment):
        ids = random_ids(1, 2 * SEGMENT * calls)
        return calls_of(lambda: gistkern.compress(model, ids, segment_length=segment))

    prefill = calls_of(lambda: plain.model(random_ids(1, 2 * SEGMENT), use_cache=True))
    for segment in (SEGMENT, 2 * SEGMENT):
        few, more, many = (compressed(calls, segment) for calls in (4, 6, 8))
        assert many - more == more - few, "each call costs the same"
        further = (many - few) / 4
        print(f"{layers} layers, segments of {segment}: {further} calls, a prefill {prefill}: {further / prefill:.3f}")
        assert further <= 1.05 * prefill or not COMPARABLE
