"""A cache is read by the model that wrote it, by a prompt that goes on from it, or not at all."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from conftest import make_model, random_ids
from peft import LoraConfig, get_peft_model
from transformers import BatchEncoding, DynamicCache

import gistkern
from gistkern.cache.fingerprint import named_modules


@pytest.fixture
def patched():
    model = make_model()
    with gistkern.patch_llama(model, num_gist_tokens=2) as handle:
        yield model, handle


def answer(model, ids, cache, **given):
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **given)
    return out[:, ids.shape[1] :]


# ---- a cache that the caller made


def test_a_dynamic_cache_passed_by_hand_is_filled():
    """Prefill, then a question: as of the plain model, whose cache it would have been."""
    context, question = random_ids(2, 12), random_ids(2, 3, 2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    both = torch.cat([mask, torch.ones_like(question)], 1)
    model, found = make_model(), []
    for patch in (False, True):
        handle = gistkern.patch_llama(model) if patch else None
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(context, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
            places = (both.cumsum(1) - 1)[:, -3:]
            logits = model(question, attention_mask=both, position_ids=places, past_key_values=cache).logits
        found.append((logits, cache.get_seq_length()))
        assert isinstance(cache, gistkern.GistCache) == patch
        assert handle is None or cache.tail_rows.tolist() == [15, 11]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("filled", [False, True])
def test_generate_fills_a_dynamic_cache(patched, filled):
    model, _ = patched
    ids, cache = random_ids(1, 6), DynamicCache()
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    if filled:
        with torch.no_grad():
            model(ids[:, :3], past_key_values=cache)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False), plain)
    assert cache.get_seq_length() == 9
    more = torch.cat([plain, random_ids(1, 3, 5)], 1)
    again = model.generate(more, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert torch.equal(again, model.generate(more, max_new_tokens=2, do_sample=False))


# ---- a prompt that goes on from what was read


def test_a_forgotten_clone_is_seen(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(2, 40))
    first, second = random_ids(2, 4, 2), random_ids(2, 12, 3)
    fresh = answer(model, second, cache.clone())
    answered = answer(model, first, cache)
    with pytest.raises(ValueError, match="token 0 of sample 0 is not the one that the cache has read"):
        answer(model, second, cache)
    assert torch.equal(answer(model, second, gistkern.compress(model, random_ids(2, 40))), fresh)
    # going on is what it is for
    chat = torch.cat([first, answered, random_ids(2, 3, 4)], 1)
    assert torch.equal(answer(model, chat, cache), answer(model, chat, gistkern.compress(model, random_ids(2, 40))))


@pytest.mark.parametrize("how", ["cloned", "saved", "pickled", "deep copy", "shared", "repeated"])
def test_an_edited_turn_is_seen_however_the_cache_travelled(patched, tmp_path, how):
    model, _ = patched
    cache, turn = gistkern.compress(model, random_ids(1, 40)), random_ids(1, 6, 2)
    if how == "shared":
        cache = cache.shared()
    chat = torch.cat([turn, answer(model, turn, cache), random_ids(1, 3, 4)], 1)
    expected = answer(model, chat, gistkern.compress(model, random_ids(1, 40)))
    if how == "saved":
        cache.save(tmp_path / "c.safetensors")
        cache = gistkern.GistCache.load(tmp_path / "c.safetensors")
    if how == "repeated":
        cache.batch_repeat_interleave(2)
        chat, expected = (ids.repeat(2, 1) for ids in (chat, expected))
    travel = {"pickled": lambda c: pickle.loads(pickle.dumps(c)), "deep copy": copy.deepcopy}
    cache = travel.get(how, lambda c: c.clone())(cache)
    edited = chat.clone()
    edited[-1, 2] = (edited[-1, 2] + 1) % 100
    with pytest.raises(ValueError, match=f"token 2 of sample {len(chat) - 1} is not the one"):
        answer(model, edited, cache.clone())
    # taken back to where it changes
    back = cache.clone()
    back.crop(2 - back.state.fed)
    fresh = gistkern.compress(model, random_ids(1, 40))
    fresh.batch_repeat_interleave(len(chat))
    assert torch.equal(answer(model, edited, back), answer(model, edited, fresh))
    assert torch.equal(answer(model, chat, cache), expected)


def test_a_turn_that_came_as_embeddings_cannot_be_compared(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 40))
    turn = random_ids(1, 6, 2)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(turn), past_key_values=cache)
    assert answer(model, torch.cat([turn, random_ids(1, 2)], 1), cache).shape == (1, 4)


@pytest.mark.parametrize("length", [5, 50])
def test_the_context_in_front_of_the_question_is_seen(patched, tmp_path, length):
    """The recipe of plain prefix caches; the last tokens of a long context may be cut anew with a question behind."""
    model, _ = patched
    context, question = random_ids(2, length), random_ids(2, 4, 2)
    mask = torch.ones_like(context)
    mask[1, :3] = 0
    cache = gistkern.compress(model, context, mask)
    cache.save(tmp_path / "c.safetensors")
    rows = [context[0].tolist(), context[1, 3:].tolist()]
    store = gistkern.compress_corpus(model, rows, tmp_path / "corpus", progress=False)
    caches = [cache, cache.shared(), gistkern.GistCache.load(tmp_path / "c.safetensors")]
    for one in (*caches, store.batch(["0", "1"]), store.batch(["0", "1"], shared=True)):
        prompts = [torch.cat([context, question], 1)]
        prompts += [torch.cat([context[:, :-4], question], 1)] if length > 20 else []
        for prompt in prompts:
            both = torch.ones_like(prompt)
            both[1, :3] = 0
            with pytest.raises(ValueError, match="sample 0 begins with the context that the cache holds"):
                answer(model, prompt, one.clone(), attention_mask=both)
    assert answer(model, torch.cat([random_ids(2, length, 7), question], 1), cache).shape == (2, 4)


def test_an_unpatched_model_says_that_it_is(patched):
    model, handle = patched
    cache = gistkern.compress(model, random_ids(1, 50))
    handle.unpatch()
    for ids in (random_ids(1, 4), random_ids(1, 70)):
        with pytest.raises(RuntimeError, match=r"call gistkern\.patch\(model\)"):
            answer(model, ids, cache.clone())


# ---- what the mask says of the past


@pytest.mark.parametrize(
    ("history", "right"),
    [
        (lambda mask: mask, True),
        (lambda mask: torch.ones_like(mask), True),  # hides nothing
        (lambda mask: mask.flip(1), False),  # hides others, as many
        (lambda mask: mask.roll(1, 1), False),
        (lambda mask: torch.zeros_like(mask), False),
    ],
)
def test_a_mask_hides_what_was_padding_and_nothing_else(patched, history, right):
    model, _ = patched
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    cache, question = gistkern.GistCache(), random_ids(2, 3, 2)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        given = torch.cat([history(mask), torch.ones_like(question)], 1)
        expected = model(question, past_key_values=cache.clone()).logits
        if right:
            assert torch.equal(model(question, attention_mask=given, past_key_values=cache).logits, expected)
        else:
            with pytest.raises(ValueError, match="attention_mask hides tokens that the cache has read"):
                model(question, attention_mask=given, past_key_values=cache)


def test_a_mask_may_cover_the_context_as_it_was_compressed(patched):
    model, _ = patched
    context, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :7] = 0
    cache, question = gistkern.compress(model, context, mask), random_ids(2, 3, 2)
    own = torch.ones_like(question)
    with torch.no_grad():
        expected = model(question, past_key_values=cache.clone()).logits
        given = torch.cat([mask, own], 1)
        assert torch.equal(model(question, attention_mask=given, past_key_values=cache.clone()).logits, expected)
        given = torch.cat([mask * (torch.arange(30) > 11), own], 1)
        with pytest.raises(ValueError, match="hides tokens that the cache has read"):
            model(question, attention_mask=given, past_key_values=cache.clone())
        with pytest.raises(ValueError, match="no cache that has read them"):
            model(question, attention_mask=given)


# ---- whose cache it is


def test_a_cache_of_another_model_is_refused_in_use(patched, tmp_path):
    model, handle = patched
    other = make_model(seed=1)
    gistkern.patch_llama(other, num_gist_tokens=2)
    twin = make_model()
    gistkern.patch_llama(twin, num_gist_tokens=2)
    ids = torch.cat([random_ids(1, 40), torch.tensor([handle.gist_token_ids]), random_ids(1, 2)], 1)
    streamed = gistkern.GistCache()
    with torch.no_grad():
        model(ids, past_key_values=streamed)
        left_over = model(ids).past_key_values
    streamed.save(tmp_path / "s.safetensors")
    for cache in (gistkern.compress(model, random_ids(1, 40)), streamed, left_over):
        for travelled in (cache.clone(), pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
            with pytest.raises(ValueError, match="written by another model"), torch.no_grad():
                other(random_ids(1, 3), past_key_values=travelled)
        with torch.no_grad():
            twin(random_ids(1, 3), past_key_values=cache.clone())  # equal weights are the same model
    with pytest.raises(ValueError, match="written by another model"):
        gistkern.GistCache.load(tmp_path / "s.safetensors", other)


def test_weights_are_looked_at_once_per_cache_and_model(patched, monkeypatch):
    model, _ = patched
    looks = []
    monkeypatch.setattr("gistkern.hf.handle.fingerprint", lambda inner: looks.append(inner) or "same")
    monkeypatch.setattr("gistkern.cache.fingerprint.fingerprint", lambda inner: looks.append(inner) or "same")
    cache = gistkern.compress(model, random_ids(1, 20))
    assert len(looks) == 1
    for _ in range(3):
        answer(model, random_ids(1, 4), cache.clone())
    with torch.no_grad():
        model(random_ids(1, 9))
    assert len(looks) == 1
    twin = make_model()
    gistkern.patch_llama(twin, num_gist_tokens=2)
    for _ in range(3):
        answer(twin, random_ids(1, 4), cache.clone())
    assert len(looks) == 2


def test_a_streamed_cache_does_not_take_the_name_of_later_weights(patched, tmp_path):
    model, _ = patched
    cache = gistkern.GistCache()
    with torch.no_grad():
        model(random_ids(1, 9), past_key_values=cache)
        model.lm_head.weight.add_(1)  # is no part of what wrote the rows
        assert cache.fingerprint is not None
        cache = gistkern.GistCache()
        model(random_ids(1, 9), past_key_values=cache)
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    with pytest.raises(ValueError, match="weights were changed since"):
        cache.save(tmp_path / "c.safetensors")
    orphan = gistkern.GistCache()
    twin = make_model()
    gistkern.patch_llama(twin, num_gist_tokens=2)
    with torch.no_grad():
        twin(random_ids(1, 9), past_key_values=orphan)
    del twin
    gc.collect()
    with pytest.raises(ValueError, match="model that wrote the cache is gone"), torch.no_grad():
        model(random_ids(1, 3), past_key_values=orphan)


def test_weights_that_changed_since_are_another_model(patched):
    model, _ = patched
    cache, ids = gistkern.compress(model, random_ids(1, 20)), random_ids(1, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids, past_key_values=cache.clone()).logits
        answered = cache.clone()
        model(random_ids(1, 4, 5), past_key_values=answered)
        model.model.layers[0].mlp.up_proj.weight.add_(1)
        for one in (cache.clone(), cache.shared(), answered):
            with pytest.raises(ValueError, match="other weights"):
                model(ids, past_key_values=one)
        model.load_state_dict(weights)
        assert torch.equal(model(ids, past_key_values=cache.clone()).logits, expected)


@pytest.mark.parametrize(
    "other",
    [
        {"rms_norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ],
)
def test_equal_weights_under_another_config_are_another_model(patched, other):
    model, _ = patched
    config = copy.deepcopy(model.config)
    config.update(other)
    config._attn_implementation = "sdpa"
    del config.gistkern
    twin = type(model)(config).to(model.dtype).eval()
    gistkern.patch_llama(twin, num_gist_tokens=2)
    twin.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="written by another model"):
        twin(random_ids(1, 3), past_key_values=gistkern.compress(model, random_ids(1, 20)))


def test_another_adapter_is_another_model(patched):
    model, _ = patched
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["gist_embeddings"], init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    cache = gistkern.compress(wrapped, random_ids(1, 20))
    ids = random_ids(1, 3)
    with torch.no_grad():
        expected = wrapped(ids, past_key_values=cache.clone()).logits
        for leave in (lambda: wrapped.set_adapter("two"), wrapped.base_model.disable_adapter_layers):
            leave()
            with pytest.raises(ValueError, match="written by another model"):
                wrapped(ids, past_key_values=cache.clone())
            wrapped.base_model.enable_adapter_layers()
            wrapped.set_adapter("one")
            assert torch.equal(wrapped(ids, past_key_values=cache.clone()).logits, expected)


def test_modules_are_those_that_torch_names(patched):
    model, _ = patched
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj  # one module in two places is named once
    model.model.layers[1].mlp.gate_proj = None
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["gist_embeddings"])
    for whole in (model, model.model, get_peft_model(model, config)):
        assert named_modules(whole) == list(whole.named_modules())


def test_moving_a_cache_where_it_is_gives_itself(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 20))
    for one in (cache, cache.shared()):
        assert one.to("cpu") is one
        assert one.to(dtype=torch.float64, device=torch.device("cpu")) is one
        half = one.to(dtype=torch.float32)
        assert half.nbytes == one.nbytes // 2
        assert half is not one


# ---- compress


def test_a_context_in_the_shapes_of_tokenizers(patched):
    model, _ = patched
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected = gistkern.compress(model, ids, mask)
    lists = [ids[0].tolist(), ids[1, 4:].tolist()]
    for given in (
        BatchEncoding({"input_ids": ids, "attention_mask": mask}),
        {"input_ids": ids.int(), "attention_mask": mask.bool()},
        {"input_ids": ids.tolist(), "attention_mask": mask.tolist()},
        {"input_ids": lists},
        {"input_ids": lists, "attention_mask": [[1] * 9, [1] * 5]},
        {"input_ids": ids.numpy(), "attention_mask": mask.numpy()},
        {"input_ids": ids, "attention_mask": mask.tolist()},
        lists,
    ):
        found = gistkern.compress(model, given)
        assert torch.equal(found.layers[-1].gist.key, expected.layers[-1].gist.key)
    alone = gistkern.compress(model, ids[:1])
    for given in (lists[0], {"input_ids": lists[0], "attention_mask": [1] * 9}):  # tokenizer(text)
        assert torch.equal(gistkern.compress(model, given).layers[-1].gist.key, alone.layers[-1].gist.key)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("a text", TypeError, "tokenize it first"),
        (["a text"], TypeError, "tokenize it first"),
        ({"ids": [1]}, ValueError, "holds no input_ids"),
        (7, TypeError, "must be token ids"),
        ([], ValueError, "list of token ids"),
        ([[1], []], ValueError, "sample 1 of the context is empty"),
        ([1.5, 2.0], ValueError, "must be integers"),
        (torch.ones(1, 3, dtype=torch.bool), ValueError, "must be integers"),
        (torch.ones(3, dtype=torch.long), ValueError, "batch, tokens"),
        (torch.tensor([[5, 100_000]]), ValueError, "the id 100000, the model's vocabulary has 100 tokens"),
        (torch.tensor([[5, -3]]), ValueError, "the id -3"),
        ({"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [1, 1]]}, ValueError, "attention_mask must be like"),
        (
            {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1, 1]])},
            ValueError,
            "attention_mask must",
        ),
    ],
)
def test_a_context_that_is_none(patched, given, error, message):
    with pytest.raises(error, match=message):
        gistkern.compress(patched[0], given)


def test_threads_compress_with_a_model_in_training(patched):
    model, _ = patched
    context = random_ids(1, 30)
    expected = gistkern.compress(model, context).layers[-1].gist.key
    model.train()
    model.model.layers[1].eval()
    before = {module: module.training for module in model.modules()}
    found = []
    for _ in range(5):
        run = lambda: found.extend(gistkern.compress(model, context).layers[-1].gist.key for _ in range(2))  # noqa: E731
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {module: module.training for module in model.modules()} == before
    assert len(found) == 30
    assert all(torch.equal(keys, expected) for keys in found)
