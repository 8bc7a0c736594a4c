"""Samples that share a document's rows say what samples with rows of their own say, from fewer bytes."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model, random_ids

import gistkern
from gistkern.backends import native
from gistkern.layout.layout import layout_of
from gistkern.layout.schemes import decode_rows
from gistkern.ops.decode import Decodes

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
    ids, real = gistkern.left_padded(rows)
    return ids, real.long()


def ragged(model, segments, lengths=(37, 9, 20)):
    return gistkern.compress(model, *left_padded([random_ids(1, n, n)[0] for n in lengths]), **segments)


def pools(cache):
    return [layer.gist for layer in cache.layers]


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
    assert shared.first is not None
    copied = own.clone()
    copied.batch_select_indices(order)
    rows = [int(own.gist_rows[sample]) for sample in range(3)]
    row_bytes = copied.nbytes // (len(order) * max(rows))
    assert shared.nbytes == sum(rows) * row_bytes, "each document once, no padding"
    assert torch.equal(said(model, shared, *questions), said(model, copied, *questions))


@pytest.mark.parametrize("kept", [[1, 2], [2, 1, 1], [0]])
def test_fewer_samples_and_several_turns(patched, kept):
    """Without the sample of most rows the columns shrink with the first padded call; what follows still agrees."""
    model, segments = patched
    own = ragged(model, segments)
    shared = own.shared()
    for cache in (own, shared):
        cache.batch_select_indices(torch.tensor(kept))
    for turn in range(3):
        ids, mask = left_padded([random_ids(1, 3 + 2 * place, 10 * turn + place)[0] for place in range(len(kept))])
        with torch.no_grad():
            found, expected = (
                model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1] for cache in (shared, own)
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            short = random_ids(len(kept), 2, turn)
            found, expected = (model(short, past_key_values=cache).logits for cache in (shared, own))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
    own = ragged(model, segments)
    shared = own.shared()
    clones = shared.clone(), shared.shared()
    for clone in clones:
        assert all(a.key.data_ptr() == b.key.data_ptr() for a, b in zip(pools(clone), pools(shared), strict=True))
    before = [rows.key.clone() for rows in pools(shared)]
    ids, other = random_ids(3, 5, 5), random_ids(3, 3, 6)
    with torch.no_grad():
        for cache in (own, *clones):
            model(ids, past_key_values=cache)
            cache.crop(-2)
        expected, *found = (model(other, past_key_values=cache).logits for cache in (own, *clones))
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert shared.tail_rows.tolist() == [0] * 3
    assert all(torch.equal(rows.key, key) for rows, key in zip(pools(shared), before, strict=True))


def one_document(tokens=20, **options):
    """An fp32 model with what it made of one document."""
    model = make_model(dtype=torch.float32, initializer_range=0.3)
    gistkern.patch_llama(model, num_gist_tokens=3, **options)
    return model, gistkern.compress(model, random_ids(1, tokens), segment_length=10)


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
def test_short_calls_decode_over_the_pool(monkeypatch, backend):
    if backend == "cpu" and native.missing():
        pytest.skip("the extension is not built")
    model, own = one_document(backend=backend)
    shared, calls = own.shared(), []
    decode = Decodes.decode

    def spy(self, q, gist, *rest):
        calls.append((q.shape[2], gist.key.data_ptr()))
        return decode(self, q, gist, *rest)

    monkeypatch.setattr(Decodes, "decode", spy)
    with torch.no_grad():
        for tokens in (9, 8, 1):
            ids = random_ids(1, tokens, tokens)
            found, expected = (model(ids, past_key_values=cache).logits for cache in (shared, own))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert calls == [(tokens, rows.key.data_ptr()) for tokens in (8, 1) for rows in pools(shared)]


def test_it_moves_to_another_dtype():
    model, own = one_document()
    shared = own.shared().to(dtype=torch.bfloat16)
    own = own.to(dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    with torch.no_grad():
        found, expected = (model(random_ids(1, 3), past_key_values=cache).logits for cache in (shared, own))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert {rows.key.dtype for rows in pools(shared)} == {layer.dtype for layer in shared.layers} == {torch.bfloat16}


@pytest.mark.parametrize("compressed", [False, True], ids=["read", "compressed and read"])
def test_autocast(compressed):
    model, own = one_document()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if compressed:
            own = gistkern.compress(model, random_ids(1, 20), segment_length=10)
        shared = own.shared()
        for tokens in (11, 2):
            ids = random_ids(1, tokens, tokens)
            found, expected = (model(ids, past_key_values=cache).logits for cache in (shared, own))
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_gradients_reach_the_question():
    """A call that trains any part of the layer goes where gradients are."""
    model, own = one_document()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("v_proj" in name)
    gradients = []
    for cache in (own.shared(), own):
        model(random_ids(1, 4), past_key_values=cache).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(gradients[0]) == 3
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_original_s_rows_are_not_kept():
    _, own = one_document(200)
    shared = own.shared()
    assert sum(layer.tail.key.untyped_storage().nbytes() for layer in shared.layers) == 0
    assert shared.nbytes == own.nbytes


def test_documents_shorter_than_the_sinks():
    """Raw tokens behind them are sinks too, but of a segment that has not ended."""
    model, segments = make_model(dtype=torch.float32, initializer_range=0.3), {"segment_length": 10}
    gistkern.patch_llama(model, num_gist_tokens=3, sink_tokens=8)
    own = ragged(model, segments, (2, 30))
    questions = left_padded([random_ids(1, n, n)[0] for n in (3, 6)])
    assert torch.equal(said(model, own.shared(), *questions), said(model, own.clone(), *questions))


def test_its_rows_are_a_plain_prefix(patched):
    model, segments = patched
    own = ragged(model, segments)
    shared = own.shared()
    shared.batch_select_indices(torch.tensor([2, 0]))
    own.batch_select_indices(torch.tensor([2, 0]))
    prefixes = [gistkern.plain_prefix(cache, model.config) for cache in (shared, own)]
    for found, expected in zip(*(prefix.layers for prefix in prefixes), strict=True):
        for sample, rows in enumerate(own.gist_rows.tolist()):
            assert torch.equal(found.keys[sample, :, -rows:], expected.keys[sample, :, -rows:])
            assert torch.equal(found.values[sample, :, -rows:], expected.values[sample, :, -rows:])


def test_what_it_cannot_do_is_said(tmp_path):
    model = make_model()
    handle = gistkern.patch_llama(model, num_gist_tokens=3)
    with pytest.raises(ValueError, match="the cache is empty"):
        gistkern.GistCache().shared()
    cache = gistkern.compress(model, random_ids(1, 20))
    shared = cache.shared()
    with pytest.raises(ValueError, match="cannot take gist tokens"), torch.no_grad():
        model(torch.tensor([[5, 6, *handle.gist_token_ids]]), past_key_values=shared)
    dropping = layout_of(decode_rows(shared.gist_rows, int(shared.gist_rows), shared.tail_rows, 0, 2))
    dropping = replace(dropping, keep_begin=dropping.keep_begin + 1)
    with pytest.raises(ValueError, match="this gist_layout would drop or add some"), torch.no_grad():
        model(random_ids(1, 2), past_key_values=shared, gist_layout=dropping)
    with pytest.raises(ValueError, match="is not saved"):
        shared.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="is not reset"):
        shared.reset()
    with torch.no_grad():
        found, expected = (model(random_ids(1, 3), past_key_values=one).logits for one in (shared, cache))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg="refusals left it as it was")
    with pytest.raises(ValueError, match="share it before asking"):
        cache.shared()
