"""Patching is a lifecycle: what it adds, what it refuses, and that everything goes back."""

import pytest
import torch
from conftest import FAMILIES, make_model, random_ids, tolerance
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import gistkern


@pytest.mark.parametrize("family", FAMILIES)
def test_without_gist_tokens_nothing_changes(family):
    model = make_model(family)
    ids, mask = random_ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts; a bare call counts padding too
    with torch.no_grad():
        before = model(ids, attention_mask=mask, position_ids=places).logits
        with gistkern.patch_llama(model):
            after = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(after[mask == 1], before[mask == 1], **tolerance(family))


def test_unpatch_restores_the_model_bit_for_bit(model):
    ids = random_ids(2, 11)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    before = model(ids).logits
    with gistkern.patch_llama(model, num_gist_tokens=4) as handle:
        assert model.config._attn_implementation == "gistkern"
        model(torch.tensor([handle.gist_token_ids]))
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not model._forward_pre_hooks
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks
    assert "prepare_inputs_for_generation" not in vars(model)
    assert torch.equal(model(ids).logits, before)
    handle.unpatch()  # again: nothing


def test_an_exception_inside_the_context_unpatches_too(model):
    with pytest.raises(KeyError), gistkern.patch_llama(model):
        raise KeyError
    assert not hasattr(model, "gistkern_handle")


def test_only_the_new_rows_are_added(model):
    before = sum(p.numel() for p in model.parameters())
    handle = gistkern.patch_llama(model, num_gist_tokens=5, num_segment_gist_tokens=2)
    assert handle.gist_token_ids == [100, 101, 102, 103, 104]
    assert handle.segment_gist_token_ids == [105, 106]
    assert [tuple(p.shape) for p in handle.trainable_parameters()] == [(7, 64)]
    assert sum(p.numel() for p in model.parameters()) == before + 7 * 64
    assert model(torch.tensor([[1, 100, 2]])).logits.shape[-1] == 100, "a gist token can never be generated"


def test_gist_rows_train_and_the_vocabulary_need_not(model):
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    (rows,) = handle.trainable_parameters()
    ids = torch.cat([random_ids(1, 8), torch.tensor([handle.gist_token_ids]), random_ids(1, 4)], 1)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite(), "labels of gist tokens are ignored, not an index error"
    assert (rows.grad.abs().sum(1) > 0).all()


def test_inner_model_alone_can_be_patched(model):
    handle = gistkern.patch_llama(model.model, num_gist_tokens=2)
    ids = torch.cat([random_ids(1, 6), torch.tensor([handle.gist_token_ids]), random_ids(1, 3)], 1)
    alone = model.model(ids).last_hidden_state
    handle.unpatch()
    with gistkern.patch_llama(model, num_gist_tokens=2):
        torch.testing.assert_close(model(ids, output_hidden_states=True).hidden_states[-1], alone)


class Tokenizer:
    """What patching needs of a transformers tokenizer."""

    def __init__(self, size, scatter=1):
        self.ids, self.size, self.scatter = {}, size, scatter

    def add_special_tokens(self, tokens, replace_extra_special_tokens=True):
        for token in tokens["additional_special_tokens"]:
            self.ids.setdefault(token, self.size + self.scatter * len(self.ids))

    def convert_tokens_to_ids(self, token):
        return self.ids[token]


def test_tokenizer_gives_the_ids_and_gives_them_again(model):
    tokenizer = Tokenizer(97)  # a tokenizer may be smaller than the padded embedding matrix
    for _ in range(2):
        with gistkern.patch_llama(model, tokenizer, num_gist_tokens=3) as handle:
            assert handle.gist_token_ids == [97, 98, 99]
            assert list(tokenizer.ids) == ["<gist_0>", "<gist_1>", "<gist_2>"]


def test_a_real_tokenizer(model):
    from tokenizers import Tokenizer as Core
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Core(models.WordLevel({f"w{i}": i for i in range(100)}, "w0")))
    with gistkern.patch_llama(model, tokenizer, num_gist_tokens=2) as handle:
        assert tokenizer("<gist_1>").input_ids == [handle.gist_token_ids[1]] == [101]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gist_tokens": 0}, "num_gist_tokens must be an int >= 1"),
        ({"positions": "rope"}, "unknown position scheme 'rope': expected one of absolute, gist_first"),
        ({"sink_tokens": -1}, "sink_tokens must be"),
        ({"backend": "cuda9"}, "unknown backend 'cuda9'"),
        ({"tokenizer": Tokenizer(97, scatter=2)}, "do not follow each other"),
    ],
)
def test_bad_settings_are_refused_before_anything_changes(model, settings, message):
    with pytest.raises(ValueError, match=message):
        gistkern.patch_llama(model, **settings)
    assert not hasattr(model.model, "gist_embeddings")
    gistkern.patch_llama(model).unpatch()


def test_patching_twice_is_an_error(model):
    with gistkern.patch_llama(model), pytest.raises(ValueError, match="patched already"):
        gistkern.patch_llama(model)


def test_unsupported_models_are_named():
    with pytest.raises(TypeError, match=r"'gpt2' cannot be patched: .* no rotary position embeddings"):
        gistkern.patch_llama(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    with pytest.raises(TypeError, match="got Linear"):
        gistkern.patch_llama(nn.Linear(2, 2))


def test_calls_that_cannot_be_served_say_why(model):
    with gistkern.patch_llama(model) as handle, torch.no_grad():
        ids = random_ids(1, 5)
        with pytest.raises(ValueError, match="output_attentions is not available"):
            model(ids, output_attentions=True)
        with pytest.raises(ValueError, match="attention_mask must be"):
            model(ids, attention_mask=torch.ones(1, 3))
        with pytest.raises(ValueError, match="padding between real tokens"):
            model(ids, attention_mask=torch.tensor([[1, 0, 1, 1, 1]]))
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model.model(input_ids=ids, inputs_embeds=torch.zeros(1, 5, 64))
        with pytest.raises(ValueError, match="gist_layout is for 1 samples of 4 rows"):
            model(ids, gist_layout=gistkern.GistLayout.from_segments([], 1, tail=4))
        assert handle.gist_token_ids[0] == 100


def test_dropout_is_refused():
    model = make_model(attention_dropout=0.1).train()
    with gistkern.patch_llama(model), pytest.raises(ValueError, match="attention dropout is not supported"):
        model(random_ids(1, 5))


def test_naming_the_implementation_without_a_patch_is_an_error(model):
    gistkern.patch_llama(model).unpatch()
    model.set_attn_implementation("gistkern")
    with pytest.raises(RuntimeError, match="patch the model instead"):
        model(random_ids(1, 5))


def test_taking_the_mask_off_after_patching_is_an_error(model):
    with gistkern.patch_llama(model, num_gist_tokens=2) as handle:
        ids = torch.tensor([[5, 6, *handle.gist_token_ids, 7]])
        masked = model(ids).logits
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="set to 'sdpa' after patching, which takes the gist mask off"):
            model(ids)
        model.set_attn_implementation("gistkern")
        assert torch.equal(model(ids).logits, masked)


def test_training_does_not_build_a_cache(model):
    with gistkern.patch_llama(model):
        assert model.train()(random_ids(1, 5)).past_key_values is None
        assert isinstance(model.eval()(random_ids(1, 5)).past_key_values, gistkern.GistCache)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    ids = torch.cat([random_ids(2, 9), torch.tensor(handle.gist_token_ids).expand(2, -1), random_ids(2, 4)], 1)

    def gradients():
        model.zero_grad()
        model.train()(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_explicit_layout_packs_documents(model):
    """Two documents in one row of the batch compute what they compute alone."""
    with gistkern.patch_llama(model, num_gist_tokens=2, sink_tokens=1) as handle, torch.no_grad():
        gists = torch.tensor([handle.gist_token_ids])
        streams = [torch.cat([random_ids(1, n, n), gists, random_ids(1, 4, n + 1)], 1) for n in (7, 12)]
        layout = gistkern.GistLayout.pack([gistkern.GistLayout.from_segments([n], 2, tail=4) for n in (7, 12)])
        packed = model(torch.cat(streams, 1), gist_layout=layout, use_cache=False).logits
        alone = torch.cat([model(stream).logits for stream in streams], 1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_a_padded_vocabulary_never_generates_a_gist_token():
    """Where the tokenizer is smaller than the embedding matrix, gist ids have logits; `generate` leaves them out."""
    model = make_model()
    tokenizer = Tokenizer(90)
    with gistkern.patch_llama(model, tokenizer, num_gist_tokens=2) as handle, torch.no_grad():
        likely = torch.nn.functional.one_hot(torch.tensor(91), 100) * 100
        model.lm_head.register_forward_hook(lambda module, args, logits: logits + likely)
        ids = random_ids(1, 5)
        logits = model(ids).logits
        assert handle.is_gist(logits[:, -1].argmax(-1)).all()
        out = [model.generate(ids, max_new_tokens=5, do_sample=False, num_beams=beams) for beams in (1, 2)]
    assert not any(handle.is_gist(one).any() for one in out)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=0)  # as the plain model's: entropies are finite


def test_a_mask_beside_a_layout_is_not_ignored(model):
    layout = gistkern.GistLayout.from_segments([], 1, tail=4)
    with gistkern.patch_llama(model), pytest.raises(ValueError, match="disagree about padding"):
        model(random_ids(1, 4), attention_mask=torch.tensor([[0, 1, 1, 1]]), gist_layout=layout)


def test_gradient_checkpointing_takes_no_cache(model):
    model.model.gradient_checkpointing_enable()
    with gistkern.patch_llama(model):
        assert model.train()(random_ids(1, 4)).past_key_values is None
        with pytest.raises(ValueError, match="cannot be filled under gradient checkpointing"):
            model(random_ids(1, 4), use_cache=True)


def test_autocast():
    model = make_model(dtype=torch.float32)
    with gistkern.patch_llama(model, num_gist_tokens=2) as handle, torch.no_grad():
        ids = torch.cat([random_ids(1, 8), torch.tensor([handle.gist_token_ids]), random_ids(1, 4)], 1)
        plain = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids, use_cache=False).logits
            cache = gistkern.compress(model, ids[:, :8])
            decoded = model(ids[:, 10:], past_key_values=cache).logits
    assert (mixed - plain).abs().max() < 0.1 * plain.abs().max()
    assert (decoded - plain[:, 10:]).abs().max() < 0.1 * plain.abs().max()


def test_patching_inner_and_outer_model_is_an_error(model):
    with gistkern.patch_llama(model.model), pytest.raises(ValueError, match="patched already"):
        gistkern.patch_llama(model)
