"""Samples that share a document's rows say what samples with rows of their own say, from fewer bytes."""

import pytest
import torch
from conftest import make_model, random_ids

import gistkern
from gistkern.shared_cache import SharedGistCache

NEW = 6
CASES = [
    pytest.param(
        ({"positions": positions, "sink_tokens": sinks, **summary}, segments, dtype), id=f"{positions}-{sinks}-{name}"
    )
    for positions, sinks, dtype in (("absolute", 1, torch.float32), ("gist_first", 0, torch.float64))
    for name, summary, segments in (
        ("segments", {}, {"segment_length": 10}),
        ("hierarchical", {"num_segment_gist_tokens": 2}, {"segment_length": 10}),
    )
]


@pytest.fixture(params=CASES)
def patched(request):
    options, segments, dtype = request.param
    model = make_model(dtype=dtype, initializer_range=0.3)
    gistkern.patch_llama(model, num_gist_tokens=3, **options)
    return model, segments


def left_padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    return ids, (ids != 0).long()


def ragged(model, segments, lengths=(37, 9, 20)):
    return gistkern.compress(model, *left_padded([random_ids(1, n, n)[0] for n in lengths]), **segments)


def said(model, cache, ids, mask=None, **options):
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, **{"do_sample": False, **options}
    )


def test_several_questions_on_each_document(patched):
    """Ragged rows, ragged questions, documents in any order and more than once."""
    model, segments = patched
    own = ragged(model, segments)
    order = torch.tensor([2, 0, 0, 1, 2, 0])
    questions = left_padded([random_ids(1, 2 + place, place + 50)[0] for place in range(len(order))])
    shared = own.shared()
    shared.batch_select_indices(order)
    assert isinstance(shared, SharedGistCache)
    copied = own.clone()
    copied.batch_select_indices(order)
    rows = [int(own.gist_rows[sample]) for sample in range(3)]
    row_bytes = copied.nbytes // (len(order) * max(rows))
    assert shared.nbytes == sum(rows) * row_bytes, "each document once, no padding"
    assert torch.equal(said(model, shared, *questions), said(model, copied, *questions))


def test_logits_of_long_and_short_calls(patched):
    """A long call gathers its rows, one of up to 8 reads the pool in place; both see what a cache of its own does."""
    model, segments = patched
    own = ragged(model, segments)
    shared = own.shared()
    for tokens in (11, 1, 8, 9, 2):
        ids = random_ids(3, tokens, tokens)
        with torch.no_grad():
            found, expected = (model(ids, past_key_values=cache).logits for cache in (shared, own))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert shared.get_seq_length() == own.get_seq_length()
    assert shared.tail_rows.tolist() == own.tail_rows.tolist() == [31] * 3


def test_one_document_many_questions(patched):
    """`generate` repeats a cache of one sample for its questions: tails only."""
    model, segments = patched
    own = gistkern.compress(model, random_ids(1, 37), **segments)
    questions, shared = random_ids(5, 4, 9), own.shared()
    before = shared.nbytes
    assert torch.equal(said(model, shared, questions), said(model, own.clone(), questions))
    tail = 4 + NEW - 1
    assert shared.nbytes == before + 5 * tail * (before // int(own.gist_rows[0]))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
def test_beams_and_several_answers(patched, options):
    model, segments = patched
    own = ragged(model, segments)
    questions = random_ids(3, 4, 9)
    answers = []
    for cache in (own.shared(), own.clone()):
        torch.manual_seed(0)
        answers.append(said(model, cache, questions, **options))
    assert torch.equal(*answers)


def test_clones_share_rows_and_crop_takes_back_the_tail(patched):
    model, segments = patched
    shared = ragged(model, segments).shared()
    first, second = shared.clone(), shared.shared()
    assert all(a.key.data_ptr() == b.key.data_ptr() for a, b in zip(first.pool, second.pool, strict=True))
    before = [rows.key.clone() for rows in shared.pool]
    ids, other = random_ids(3, 5, 5), random_ids(3, 3, 6)
    with torch.no_grad():
        model(ids, past_key_values=first)
        first.crop(-2)
        found = model(other, past_key_values=first).logits
        model(ids[:, :3], past_key_values=second)
        expected = model(other, past_key_values=second).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert shared.tail_rows.tolist() == [0] * 3
    assert all(torch.equal(rows.key, key) for rows, key in zip(shared.pool, before, strict=True))


def test_it_moves_to_another_dtype():
    model = make_model(dtype=torch.float32)
    gistkern.patch_llama(model, num_gist_tokens=3)
    shared = gistkern.compress(model, random_ids(1, 20)).shared().to(dtype=torch.bfloat16)
    assert {rows.key.dtype for rows in shared.pool} == {layer.dtype for layer in shared.layers} == {torch.bfloat16}
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert model(random_ids(2, 3)[:1], past_key_values=shared).logits.isfinite().all()


def test_what_it_cannot_do_is_said(tmp_path):
    model = make_model()
    handle = gistkern.patch_llama(model, num_gist_tokens=3)
    with pytest.raises(ValueError, match="the cache is empty"):
        gistkern.GistCache().shared()
    cache = gistkern.compress(model, random_ids(1, 20))
    shared = cache.shared()
    with pytest.raises(ValueError, match="cannot take gist tokens"), torch.no_grad():
        model(torch.tensor([[5, 6, *handle.gist_token_ids]]), past_key_values=shared)
    with pytest.raises(ValueError, match="is not saved"):
        shared.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="is not reset"):
        shared.reset()
    with torch.no_grad():
        assert model(random_ids(1, 3), past_key_values=shared).logits.isfinite().all(), "refusals left it usable"
        model(random_ids(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="share it before asking"):
        cache.shared()
