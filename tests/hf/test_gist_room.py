"""Rows of a compression are written once, into room that its first call makes; nobody else ever sees the room."""

import copy
import dataclasses
import pickle
from unittest import mock

import pytest
import torch
from conftest import make_model, random_ids

import gistkern
from gistkern.cache.layer import GistLayer
from gistkern.ops.attention import AttentionOptions

SEGMENT = 16
LENGTHS = {"one": (100,), "alike": (100, 100), "ragged": (100, 37, 3), "short": (9,)}
pytestmark = pytest.mark.filterwarnings("ignore:the gist rows were never trained")


@pytest.fixture(autouse=True)
def calls_of_one_segment(monkeypatch):
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: SEGMENT)


def patched(**settings):
    model = make_model()
    return model, gistkern.patch(model, num_gist_tokens=2, **settings)


def compressed(model, lengths, **more):
    context = [random_ids(1, count, count)[0].tolist() for count in lengths]
    return gistkern.compress(model, context, segment_length=SEGMENT, **more)


def stored(cache):
    return [tensor for layer in cache.layers for tensor in layer.tensors()]


def same(cache, other):
    assert len(stored(cache)) == len(stored(other))
    return all(map(torch.equal, stored(cache), stored(other))) and cache.nbytes == other.nbytes


def without_room():
    """As if each call were alone: every one copies the rows before it."""
    read = GistLayer.read

    def alone(self, q, k, v, layout, plan, options):
        return read(self, q, k, v, layout, dataclasses.replace(plan, capacity=0), options)

    return mock.patch.object(GistLayer, "read", alone)


def asked(model, cache, seed):
    question = random_ids(cache.batch_size, 5, 1000 + seed)
    return model.generate(question, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)


def gone_on(model, cache, seed):
    """One more segment, by calls of the model."""
    handle, batch = model.gistkern_handle, max(1, cache.batch_size)
    ids = torch.cat([random_ids(batch, 6, 2000 + seed), torch.tensor([handle.gist_token_ids]).expand(batch, -1)], 1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(random_ids(batch, 3, 3000 + seed), past_key_values=cache)  # which ends the segment
    return cache


@pytest.mark.parametrize("summary", [0, 2], ids=["segments", "hierarchical"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_rows_are_those_of_calls_that_copy_and_nothing_more_is_held(lengths, summary):
    model, _ = patched(num_segment_gist_tokens=summary)
    with without_room():
        expected = compressed(model, lengths)
    cache = compressed(model, lengths)
    assert same(cache, expected)
    for layer in cache.layers:
        assert layer._room is None
        for tensor in layer.gist.tensors():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert tensor.is_contiguous()
    assert torch.equal(asked(model, cache.clone(), 1), asked(model, expected.clone(), 1))


@pytest.mark.parametrize("inference", [False, True])
def test_no_call_moves_the_rows_before_it(inference):
    model, handle = patched(sink_tokens=3)
    places, counts = [], []

    def look(module, args, kwargs, output):
        layers = kwargs["cache" if "cache" in kwargs else "past_key_values"].layers
        places.append([tensor.data_ptr() for layer in layers for tensor in layer.gist.tensors()])
        counts.append({layer.gist.key.shape[2] for layer in layers})

    with handle.inner.register_forward_hook(look, with_kwargs=True), torch.inference_mode(inference):
        cache = compressed(model, (100,))
    assert len(places) == 7
    assert all(place == places[0] for place in places)
    assert counts == [{3 + 2 * calls} for calls in range(1, 8)]
    assert len(set(places[0])) == 2 * len(cache.layers)


def test_quantized_at_the_end():
    model, _ = patched()
    with without_room():
        expected = compressed(model, (100, 37), gist_dtype=torch.int8)
    assert same(compressed(model, (100, 37), gist_dtype=torch.int8), expected)


def test_under_a_dispatch_mode_rows_are_copied():
    """Operators write to no room: the calls go on with the rows that they hand back."""
    from bench.measured.calls import Operations

    model, _ = patched()
    expected = compressed(model, (100,))
    with Operations() as found:
        assert same(compressed(model, (100,)), expected)
    assert found.total


def test_layers_of_one_mode_and_then_another():
    """Whoever turns a dispatch mode on in the middle of a compression, and off again, gets the same rows."""
    from bench.measured.calls import Operations

    model, handle = patched()
    expected = compressed(model, (100,))
    modes, calls = [], []

    def before(module, args, kwargs):
        calls.append(len(modes))
        if len(calls) == 3:
            modes.append(Operations())
            modes[0].__enter__()

    def after(module, args, kwargs, output):
        if len(calls) == 4:
            modes[0].__exit__(None, None, None)

    with (
        handle.inner.register_forward_pre_hook(before, with_kwargs=True),
        handle.inner.register_forward_hook(after, with_kwargs=True),
    ):
        assert same(compressed(model, (100,)), expected)
    assert modes[0].total
    assert len(calls) == 7


@pytest.mark.parametrize("failing", [0, 1])
def test_a_layer_that_fails_stays_as_it_was(failing):
    model, handle = patched()
    expected = compressed(model, (100,))
    held = []

    class StoppedError(Exception):
        pass

    attend, read = gistkern.cache.layer.attend, GistLayer.read

    def fails(self, *given):
        layers.append(self)
        if len(layers) - 1 != 3 * len(expected.layers) + failing:  # in the fourth call
            return read(self, *given)
        gist, room = self.gist, self._room
        held.append((self, gist, room, [t.clone() for t in gist.tensors()]))

        def after(*arguments, **named):
            attend(*arguments, **named)  # has written to the room by then
            raise StoppedError

        with mock.patch("gistkern.cache.layer.attend", after):
            return read(self, *given)

    layers = []
    with mock.patch.object(GistLayer, "read", fails), pytest.raises(StoppedError):
        compressed(model, (100,))
    ((layer, gist, room, rows),) = held
    assert layer.gist is gist
    assert layer._room is room
    assert room is not None
    assert all(map(torch.equal, gist.tensors(), rows))
    assert same(compressed(model, (100,)), expected)
    assert handle.inner.training is False


def test_a_backend_that_refuses_leaves_no_room():
    layer = GistLayer()
    model, _ = patched()
    cache = compressed(model, (9,))
    key = cache.layers[0].gist.key
    with pytest.raises(ValueError, match="unknown backend"):
        layer.read(key, key, key, _layout(), mock.Mock(capacity=30, keep_gists=None), AttentionOptions(None, "no"))
    assert layer.gist is None
    assert layer._room is None


def _layout():
    return gistkern.GistLayout.from_segments([1], 2, sink_tokens=0)


# ---- what goes on from a finished cache has memory of its own


@pytest.mark.parametrize("lengths", [LENGTHS["one"], LENGTHS["ragged"]], ids=["one", "ragged"])
@pytest.mark.parametrize(
    "copied",
    [
        lambda cache: cache.clone(),
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
    ],
    ids=["clone", "deepcopy", "pickle"],
)
def test_two_that_go_on_from_one_cache_write_to_neither(lengths, copied):
    model, _ = patched()
    cache = compressed(model, lengths)
    alone = [gone_on(model, compressed(model, lengths), seed) for seed in (1, 2)]
    before = [tensor.clone() for tensor in stored(cache)]
    first, second = copied(cache), copied(cache)
    for one in (first, second):
        one.accept(model.gistkern_handle)
    answer = asked(model, first.clone(), 7)
    for seed, one in ((1, first), (2, second)):
        gone_on(model, one, seed)
    assert same(first, alone[0])
    assert same(second, alone[1])
    assert not same(first, second)
    assert all(map(torch.equal, stored(cache), before))
    assert torch.equal(asked(model, cache.clone(), 7), answer)
    # their tails grow in turns, each into room of its own
    for seed in (11, 12, 13):
        with torch.no_grad():
            for number, one in enumerate((first, second)):
                model(random_ids(len(lengths), 1, seed + 100 * number), past_key_values=one)
                model(random_ids(len(lengths), 1, seed + 100 * number), past_key_values=alone[number])
    assert same(first, alone[0])
    assert same(second, alone[1])


def test_an_answer_is_taken_back_and_the_context_goes_on():
    model, _ = patched()
    cache, other = compressed(model, (100,)), compressed(model, (100,))
    rows = [tensor.clone() for tensor in stored(cache)]
    with torch.no_grad():
        model(random_ids(1, 6, 5), past_key_values=cache)
    cache.crop(-6)
    assert all(map(torch.equal, stored(cache), rows))
    assert same(gone_on(model, cache, 3), gone_on(model, other, 3))
    fresh = compressed(model, (37,))
    asked(model, fresh, 4)  # an answer that stays in the cache
    for one in (cache, fresh):
        gone_on(model, one, 5)
    assert cache.nbytes == sum(tensor.nbytes for tensor in stored(cache))
    cache.reset()
    assert same(gone_on(model, cache, 6), gone_on(model, gistkern.GistCache(), 6))
