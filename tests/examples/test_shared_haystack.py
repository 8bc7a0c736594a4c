"""Contexts that share a row: every sample reads exactly what it would in a row of its own."""

import random

import pytest
import torch
from conftest import smoke, tiny_llama

from gistkern import GistLayout, compress, left_padded, patch_llama, segments_of
from gistkern.layout.checks import check_intervals
from gistkern.training import Share, Stage
from passkey.data import PasskeyData
from passkey.models import fast_tokenizer
from passkey.niah import KEY_DIGITS, Haystack, train_tokenizer
from passkey.settings import Data, Segments
from passkey.shared_haystack import needle_segments, plain_segments

LENGTHS = [7, 5, 6, 9, 4]
MEMBERS = [[0, 1, 2], [3, 0, 2, 1], [4]]
TAIL = 4


def patched(sink_tokens=0):
    model = tiny_llama(0)
    handle = patch_llama(
        model, num_gist_tokens=3, num_segment_gist_tokens=2, positions="gist_first", sink_tokens=sink_tokens
    )
    return model.eval(), handle


def tokens(count, seed):
    return torch.randint(1, 1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_samples_equal_rows_of_their_own(sink_tokens):
    model, handle = patched(sink_tokens)
    layout = GistLayout.shared_segments(LENGTHS, MEMBERS, 2, 3, tail=TAIL, sink_tokens=sink_tokens)
    check_intervals(layout)
    segments = [tokens(length, seed) + handle.segment_gist_token_ids for seed, length in enumerate(LENGTHS)]
    tails = [handle.gist_token_ids + tokens(TAIL, 10 + sample) for sample in range(len(MEMBERS))]

    def logits(row, row_layout):
        with torch.no_grad():
            return model(torch.tensor([row]), gist_layout=row_layout).logits[0]

    together = logits([token for part in (*segments, *tails) for token in part], layout)
    together = together[-len(MEMBERS) * (3 + TAIL) :].view(len(MEMBERS), 3 + TAIL, -1)
    for shared, members, tail in zip(together, MEMBERS, tails, strict=True):
        own = GistLayout.hierarchical([LENGTHS[index] for index in members], 2, 3, tail=TAIL, sink_tokens=sink_tokens)
        alone = logits([token for index in members for token in segments[index]] + tail, own)[-3 - TAIL :]
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().nan_to_num().max() > 0.01, "samples differ, so equality means something"


@pytest.mark.parametrize(
    ("members", "sinks", "message"),
    [
        ([], 0, "members lists no context"),
        ([[0], []], 0, "context 1 needs at least one segment and none twice, got \\[\\]"),
        ([[1, 1]], 0, "context 0 needs at least one segment and none twice, got \\[1, 1\\]"),
        ([[0], [5]], 0, "context 1 must name segments 0..4, got \\[5\\]"),
        ([[0], [4]], 5, "first segment of context 1 has 4 tokens, which must be at least the 5 sink tokens"),
    ],
)
def test_refusals(members, sinks, message):
    with pytest.raises(ValueError, match=message):
        GistLayout.shared_segments(LENGTHS, members, 2, 3, tail=TAIL, sink_tokens=sinks)


@pytest.mark.parametrize("count", [20, 24, 25, 96, 97, 168, 169, 1000])
def test_cut_is_how_compress_cuts(count):
    model = tiny_llama(0).eval()
    read = []
    with patch_llama(model, num_gist_tokens=1) as handle:

        def note(module, given, kwargs):
            call = kwargs["gist_plan"]
            ids = torch.where(call.plan.layout.is_gist, call.rows + handle.first_id, call.words)
            read.extend(ids[0].tolist())

        hook = model.model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        ids = [number % 900 for number in range(count)]
        compress(model, ids, segment_length=96, segment_overlap=24)
        hook.remove()
        cut = segments_of(ids, 96, 24)
        assert read == [token for piece in cut for token in (*piece, *handle.gist_token_ids)]
    places = segments_of(range(count), 96, 24)
    assert [ids[place.start : place.stop] for place in places] == cut


@pytest.mark.parametrize("language", ["en", "ko"])
def test_needle_segments_hold_the_needle_and_plain_ones_do_not(language):
    haystack = Haystack(train_tokenizer(), language, False, random.Random(0))
    parts = set()
    for _ in range(60):
        found, key = needle_segments(haystack, 96, 24)
        parts.add(len(found))
        texts = [haystack.tokenizer.decode(ids) for ids in found]
        assert any(key in text for text in texts)
        assert all(len(ids) == 96 for ids in found[:-1])
        assert 0 < len(found[-1]) <= 96
    assert parts == {1, 2}, "some needles are cut by a boundary"
    plain = plain_segments(haystack, 50, 96, 24)
    assert [len(ids) for ids in plain[:-1]] == [96] * 49
    assert 24 < len(plain[-1]) <= 96
    assert plain[0][-24:] == plain[1][:24], "neighbors overlap"
    announced = {"en": "pass key", "ko": "패스키"}[language]
    assert not any(announced in haystack.tokenizer.decode(ids) for ids in plain)


def test_a_shared_batch_predicts_its_answers():
    """Changing a sample's own key changes its logits alone; the places that predict stand before the answers."""
    model, handle = patched()
    settings = smoke(data=Data(languages=("en",)), segments=Segments(96, 12))
    data = PasskeyData(settings, settings.curriculum.made(), handle, fast_tokenizer())
    batch = data.batch(Stage(segments=(4, 4), segment_length=48, batch_size=3, steps=1), random.Random(3), Share())
    check_intervals(batch["gist_layout"])
    row, (places,) = batch["input_ids"][0], (batch["labels"][0] != -100).nonzero(as_tuple=True)
    answers = row[places].view(3, KEY_DIGITS)
    assert torch.equal(batch["labels"][0, places].view(3, KEY_DIGITS), answers)
    answer = answers[1].tolist()
    first_statement = next(i for i in range(len(row)) if row[i : i + KEY_DIGITS].tolist() == answer)
    changed = row.clone()
    changed[first_statement] = changed[first_statement - 1]
    with torch.no_grad():
        before, after = (
            model(ids, gist_layout=batch["gist_layout"], logits_to_keep=places - 1).logits.view(3, KEY_DIGITS, -1)
            for ids in (batch["input_ids"], changed[None])
        )
    differs = [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]
    assert differs == [False, True, False]


def test_segments_and_rows_that_are_none_are_refused():
    with pytest.raises(ValueError, match="segment_overlap must be less than segment_length, got 4 and 4"):
        segments_of([1, 2, 3], 4, 4)
    with pytest.raises(ValueError, match="no rows to pad"):
        left_padded([])
