"""`generate` over a compressed context: greedy, sampled, beams, several answers, ragged, several turns."""

import pytest
import torch
from conftest import make_model, random_ids

import gistkern

NEW = 6
NO_END = {"eos_token_id": -1}  # transformers 5.6 looks prompts up with an end of text only


@pytest.fixture(params=["absolute", "gist_first"])
def patched(request):
    model = make_model()
    handle = gistkern.patch_llama(model, num_gist_tokens=3, positions=request.param, sink_tokens=1)
    return model, handle


def greedy_by_hand(model, stream, count=NEW):
    """Greedy continuation by full masked forwards over the whole stream, no cache at all."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(stream, use_cache=False).logits[:, -1]
        stream = torch.cat([stream, logits.argmax(-1, keepdim=True)], 1)
    return stream[:, -count:]


def full_stream(handle, context, question):
    return torch.cat([context, torch.tensor([handle.gist_token_ids]), question], 1)


def test_greedy_equals_full_forwards(patched):
    model, handle = patched
    context, question = random_ids(1, 25), random_ids(1, 4, 2)
    cache = gistkern.compress(model, context)
    out = model.generate(question, past_key_values=cache.clone(), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out[:, :4], question)
    assert torch.equal(out[:, 4:], greedy_by_hand(model, full_stream(handle, context, question)))


def test_short_context_long_question(patched):
    """The question may be longer than the context: nothing is subtracted from it."""
    model, handle = patched
    context, question = random_ids(1, 2), random_ids(1, 30, 2)
    out = model.generate(
        question, past_key_values=gistkern.compress(model, context), max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(out[:, 30:], greedy_by_hand(model, full_stream(handle, context, question)))


def test_ragged_batch_with_left_padded_questions(patched):
    model, handle = patched
    contexts, questions = [random_ids(1, n, n) for n in (25, 9)], [random_ids(1, n, n + 50) for n in (3, 6)]

    def left_padded(rows):
        width = max(row.shape[1] for row in rows)
        ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
        return ids, (ids != 0).long()

    cache = gistkern.compress(model, *left_padded(contexts))
    ids, mask = left_padded(questions)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    for row in range(2):
        expected = greedy_by_hand(model, full_stream(handle, contexts[row], questions[row]))
        assert torch.equal(out[row : row + 1, 6:], expected)


def test_a_second_turn_goes_on_where_the_first_ended(patched):
    """transformers' convention: pass everything after the context again, the cache skips what it has read."""
    model, handle = patched
    context, first, second = random_ids(1, 20), random_ids(1, 4, 2), random_ids(1, 5, 3)
    cache = gistkern.compress(model, context)
    turn = model.generate(first, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    both = torch.cat([turn, second], 1)
    out = model.generate(both, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out[:, both.shape[1] :], greedy_by_hand(model, full_stream(handle, context, both)))


def test_a_second_turn_of_a_ragged_batch(patched):
    model, handle = patched
    context = random_ids(2, 15)
    first, second = random_ids(2, 5, 2), random_ids(2, 3, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    cache = gistkern.compress(model, context)
    turn = model.generate(first, attention_mask=mask, past_key_values=cache, max_new_tokens=2, do_sample=False)
    both = torch.cat([turn, second], 1)
    longer = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    out = model.generate(both, attention_mask=longer, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    for row in range(2):
        real = both[row : row + 1, longer[row] == 1]
        expected = greedy_by_hand(model, full_stream(handle, context[row : row + 1], real))
        assert torch.equal(out[row : row + 1, both.shape[1] :], expected)


def test_prompt_with_gists_and_no_cache_of_ours(patched):
    """A prompt that holds context, gists and question generates gist-masked, and its raw rows are dropped."""
    model, handle = patched
    stream = full_stream(handle, random_ids(1, 25), random_ids(1, 4, 2))
    out = model.generate(stream, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, -NEW:], greedy_by_hand(model, stream))
    assert out.past_key_values.gist_rows.tolist() == [4]
    assert out.past_key_values.tail_rows.tolist() == [4 + NEW - 1]


def test_beams_agree_with_the_uncached_beam_search(patched):
    model, handle = patched
    context, question = random_ids(1, 25), random_ids(1, 4, 2)
    options = {"max_new_tokens": NEW, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    cached = model.generate(question, past_key_values=gistkern.compress(model, context), **options)
    stream = full_stream(handle, context, question)
    uncached = model.generate(stream, use_cache=False, **options)
    assert torch.equal(cached[:, -NEW:], uncached[:, -NEW:])


def test_sampling_is_reproducible_and_several_answers_share_the_context(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 25))
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(
            model.generate(
                random_ids(1, 4, 2),
                past_key_values=cache.clone(),
                max_new_tokens=NEW,
                do_sample=True,
                num_return_sequences=3,
            )
        )
    assert runs[0].shape == (3, 4 + NEW)
    assert torch.equal(*runs)
    assert cache.tail_rows.tolist() == [0], "a clone was used up, not the cache"


def test_one_context_many_questions(patched):
    model, handle = patched
    context, questions = random_ids(1, 25), random_ids(3, 4, 2)
    cache = gistkern.compress(model, context)
    out = model.generate(questions, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    for row in range(3):
        expected = greedy_by_hand(model, full_stream(handle, context, questions[row : row + 1]))
        assert torch.equal(out[row : row + 1, 4:], expected)


def test_misuse_is_explained(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(2, 12))
    with pytest.raises(ValueError, match="3 rows for a cache of 2 samples"):
        model.generate(random_ids(3, 4), past_key_values=cache.clone(), max_new_tokens=2)
    with pytest.raises(ValueError, match="the cache holds 2 samples, the call has 4"):
        model(random_ids(4, 4), past_key_values=cache.clone())
    used = cache.clone()
    model.generate(random_ids(2, 4), past_key_values=used, max_new_tokens=4, do_sample=False)
    with pytest.raises(ValueError, match="has read 7 tokens after the compressed context already"):
        model.generate(random_ids(2, 4), past_key_values=used, max_new_tokens=2)


def test_foreign_caches_are_refused(patched):
    from transformers import DynamicCache, StaticCache

    model, handle = patched
    with pytest.raises(TypeError, match="reads a GistCache, got a StaticCache"):
        model(random_ids(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=9))
    handle.unpatch()
    full = DynamicCache()
    model(random_ids(1, 4), past_key_values=full)
    with gistkern.patch_llama(model), pytest.raises(TypeError, match="DynamicCache with tokens in it"):
        model(random_ids(1, 4), past_key_values=full)


def test_a_gist_cache_needs_a_patched_model(patched):
    model, handle = patched
    cache = gistkern.compress(model, random_ids(1, 12))
    handle.unpatch()
    with pytest.raises(RuntimeError, match=r"call gistkern.patch\(model\) first"):
        model(random_ids(1, 4), past_key_values=cache)


def test_what_would_drop_tokens_is_refused(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 9))
    with pytest.raises(ValueError, match="prefill_chunk_size is not supported"):
        model.generate(random_ids(1, 7), past_key_values=cache, prefill_chunk_size=3, max_new_tokens=2)


def test_a_mask_that_hides_what_was_read_is_refused(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(2, 9))
    model(random_ids(2, 4), past_key_values=cache)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="hides tokens that the cache has read as real"):
        model(random_ids(2, 2), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    "option",
    [
        {"prompt_lookup_num_tokens": 3, **NO_END},
        {"encoder_repetition_penalty": 1.2},
        {"encoder_no_repeat_ngram_size": 1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_look_gist_tokens_up_in_the_logits(patched, option):
    model, handle = patched
    context, question = random_ids(1, 9), random_ids(1, 4, 2)
    stream = full_stream(handle, context, torch.cat([question, context[:, -1:]], 1))  # the gists are what follows
    with pytest.raises(ValueError, match=f"{next(iter(option))} looks the prompt's tokens up in the logits"):
        model.generate(stream, max_new_tokens=NEW, do_sample=False, **option)
    cache = gistkern.compress(model, context)
    assert model.generate(question, past_key_values=cache, max_new_tokens=NEW, **option).shape == (1, 4 + NEW)


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_beams_of_a_ragged_batch(patched, beams, shared):
    model, handle = patched
    contexts, questions = [random_ids(1, n, n) for n in (21, 8)], [random_ids(1, n, n + 50) for n in (4, 7)]
    ids, mask = gistkern.left_padded([row[0] for row in questions])
    cache = gistkern.compress(model, *gistkern.left_padded([row[0] for row in contexts]))
    options = {"max_new_tokens": NEW, "num_beams": beams, "num_return_sequences": 2, "do_sample": False}
    cache = cache.shared() if shared else cache
    found = model.generate(ids, attention_mask=mask.long(), past_key_values=cache, **options)
    for row in range(2):
        stream = full_stream(handle, contexts[row], questions[row])
        expected = model.generate(stream, attention_mask=torch.ones_like(stream), use_cache=False, **options)
        assert torch.equal(found[2 * row : 2 * row + 2, -NEW:], expected[:, -NEW:])


@pytest.mark.parametrize("how", ["draft", "patched draft", "prompt"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_assisted_decoding_says_the_same_and_goes_on(patched, how, shared):
    model, handle = patched
    context, question = random_ids(1, 25), random_ids(1, 3, 2).repeat(1, 3)
    cache = gistkern.compress(model, context)
    cache = cache.shared() if shared else cache
    options = {"max_new_tokens": 2 * NEW, "do_sample": False}
    draft = make_model(seed=7, num_hidden_layers=1)
    if how == "patched draft":
        gistkern.patch_llama(draft, num_gist_tokens=3, positions=handle.positions)
    given = {"prompt_lookup_num_tokens": 4, **NO_END} if how == "prompt" else {"assistant_model": draft}
    mask = torch.ones_like(question)
    out = model.generate(
        question, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **options, **given
    )
    assert out.past_key_values is cache
    stream = full_stream(handle, context, question)
    assert torch.equal(out.sequences[:, 9:], greedy_by_hand(model, stream, 2 * NEW))
    more = torch.cat([out.sequences, random_ids(1, 2, 5)], 1)
    again = model.generate(more, attention_mask=torch.ones_like(more), past_key_values=cache, **options)
    stream = full_stream(handle, context, more)
    assert torch.equal(again[:, more.shape[1] :], greedy_by_hand(model, stream, 2 * NEW))
