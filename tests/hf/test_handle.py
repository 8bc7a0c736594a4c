"""A patched model in other people's hands: failures, copies, shared configs, new vocabularies, frozen weights."""

import copy
import io
import pickle

import pytest
import torch
from conftest import make_model, random_ids
from tokenizers import Tokenizer as Core
from tokenizers import models
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import gistkern
from gistkern.hf import patch as patching


def tokenizer(words=100):
    core = Core(models.WordLevel({f"w{i}": i for i in range(words)}, "w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0")


def stream(handle):
    return torch.cat([random_ids(1, 9), torch.tensor([handle.gist_token_ids]), random_ids(1, 4, 2)], 1)


def fail(*_, **__):
    raise RuntimeError("no")


@pytest.mark.parametrize("where", ["attention", "rows", "tokenizer", "install"])
def test_a_patch_that_fails_leaves_nothing(model, monkeypatch, where):
    words = tokenizer()
    config, names = model.config, (set(vars(model)), set(vars(model.model)))
    with monkeypatch.context() as broken:
        if where == "attention":
            broken.setattr(type(model), "set_attn_implementation", fail)
        elif where == "tokenizer":
            broken.setattr(words, "add_special_tokens", fail)
        else:
            broken.setattr(patching, "fresh_rows" if where == "rows" else "GistEmbedding", fail)
        with pytest.raises(RuntimeError, match=r"^no$"):
            gistkern.patch_llama(model, words)
    assert model.config is config
    assert not hasattr(config, "gistkern")
    assert config._attn_implementation == "sdpa"
    assert (set(vars(model)), set(vars(model.model))) == names
    assert not model.model._forward_pre_hooks
    assert where == "install" or len(words) == 100
    with gistkern.patch_llama(model, words) as handle:
        assert handle.gist_token_ids[0] == 100


@pytest.mark.parametrize(("wrong", "hint"), [(10, "write num_gist_tokens=10"), ("gpt2", "got str"), (True, "got bool")])
def test_no_tokenizer_is_said(model, wrong, hint):
    with pytest.raises(TypeError, match=hint):
        gistkern.patch_llama(model, wrong)


def test_a_tokenizer_is_not_changed_where_its_ids_cannot_follow(model):
    words = tokenizer()
    gistkern.patch_llama(model, words, num_gist_tokens=2).unpatch()
    words.add_tokens(["mine"])
    with pytest.raises(ValueError, match=r"do not follow each other: \[100, 101, 103\]"):
        gistkern.patch_llama(model, words, num_gist_tokens=3)
    assert len(words) == 103
    assert not hasattr(model, "gistkern_handle")


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deep", "pickle", "save"],
)
@torch.no_grad()
def test_a_copy_is_patched_by_itself(model, copied):
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    ids = stream(handle)
    expected = model(ids).logits
    other = copied(model)
    assert torch.equal(other(ids).logits, expected)
    for parameter in other.parameters():
        parameter += 0.1
    assert not torch.equal(other(ids).logits, expected)
    assert not torch.equal(
        gistkern.compress(other, ids[:, :9]).layers[0].gist.key, gistkern.compress(model, ids[:, :9]).layers[0].gist.key
    )
    other.generate(ids[:, :9], max_new_tokens=2)
    other.gistkern_handle.unpatch()
    assert torch.equal(model(ids).logits, expected)
    assert not other.model._forward_pre_hooks
    assert other.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_models_that_shared_a_config_do_not_share_a_patch(model):
    other = LlamaForCausalLM(model.config).double().eval()
    ids = random_ids(1, 6)
    plain = other(ids).logits
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    assert torch.equal(other(ids).logits, plain)
    second = gistkern.patch_llama(other, num_gist_tokens=3)
    handle.unpatch()
    torch.testing.assert_close(other(ids).logits, plain)
    assert second.gist_token_ids == [100, 101, 102]
    third = LlamaForCausalLM(other.config).double()  # of a config that says so: no checkpoint is asked for
    gistkern.patch_llama(third).unpatch()
    assert third.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "grow",
    [
        lambda model: model.resize_token_embeddings(102, mean_resizing=False),
        lambda model: model.set_input_embeddings(nn.Embedding(101, 64).double()),
    ],
    ids=["resize", "set"],
)
@torch.no_grad()
def test_new_words_do_not_become_gist_tokens(model, grow):
    gistkern.patch_llama(model, num_gist_tokens=4)
    grow(model)
    for call in (model, lambda ids: gistkern.compress(model, ids)):
        with pytest.raises(ValueError, match=r"resized from 100 to 10. tokens after patching.*goes back"):
            call(random_ids(1, 4))
    model.gistkern_handle.unpatch()
    model(random_ids(1, 4))


@torch.no_grad()
def test_a_resize_can_be_taken_back(model):
    gistkern.patch_llama(model, num_gist_tokens=4)
    ids = stream(model.gistkern_handle)
    expected = model(ids).logits
    model.resize_token_embeddings(102, mean_resizing=False)
    model.resize_token_embeddings(100)
    model.tie_weights()
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_a_tokenizer_keeps_new_words_and_gist_tokens_apart(model, tmp_path):
    words = tokenizer()
    handle = gistkern.patch_llama(model, words, num_gist_tokens=2)
    before = model(stream(handle)).logits
    words.add_tokens(["mine"])
    model.resize_token_embeddings(len(words), mean_resizing=False)
    mine = words.convert_tokens_to_ids("mine")
    assert mine == 102
    after = model(stream(handle)).logits
    torch.testing.assert_close(after[..., :100], before[..., :100])
    ids = torch.tensor([[5, mine, *handle.gist_token_ids, mine, 7]])
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    gistkern.patch_llama(again, PreTrainedTokenizerFast.from_pretrained(tmp_path))
    torch.testing.assert_close(again(ids).logits, expected)


def test_a_larger_tokenizer_puts_gist_tokens_behind_its_words(model):
    handle = gistkern.patch_llama(model, tokenizer(105), num_gist_tokens=2)
    assert handle.gist_token_ids == [105, 106]
    model(stream(handle))


@pytest.mark.parametrize("padded", [False, True])
def test_the_models_own_embedding_refuses_gist_ids(model, padded):
    handle = gistkern.patch_llama(model, tokenizer(90) if padded else None, num_gist_tokens=2)
    with pytest.raises(ValueError, match="gist tokens have no rows in the model's own embedding"):
        model.get_input_embeddings()(stream(handle))
    model.get_input_embeddings()(random_ids(1, 4) % 90)


def test_an_optimizer_made_after_freezing_trains_the_rows(model):
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    model.requires_grad_(False)
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=1.0)
    rows = handle.inner.gist_embeddings.weight
    before = rows.detach().clone()
    ids = stream(handle)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert (rows != before).any(1).all()
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not rows)


def test_rows_that_were_never_trained_are_said_once(model, recwarn, tmp_path):
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    model.train()
    handle.warn_if_untrained()
    assert not recwarn, "not in training"
    model.half().float().eval()
    for _ in range(2):
        handle.warn_if_untrained()
    (warning,) = recwarn
    assert issubclass(warning.category, UserWarning)
    assert "never trained" in str(warning.message)
    model.save_pretrained(tmp_path)
    gistkern.patch_llama(LlamaForCausalLM.from_pretrained(tmp_path)).warn_if_untrained()
    other = gistkern.patch_llama(make_model())
    with torch.no_grad():
        other.trainable_parameters()[0][0, 0] += 1e-3
    other.warn_if_untrained()
    assert len(recwarn) == 1


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")],
    ids=["inference", "no-grad", "meta"],
)
def test_where_it_is_patched_does_not_matter(model, mode):
    expected = gistkern.patch_llama(make_model()).inner.gist_embeddings.weight
    with mode():
        handle = gistkern.patch_llama(model)
    rows = handle.inner.gist_embeddings.weight
    assert torch.equal(rows, expected)
    ids = stream(handle)
    model(ids, labels=ids).loss.backward()
    assert (rows.grad.abs().sum(1) > 0).all()


def test_the_default_dtype_does_not_matter(model):
    torch.set_default_dtype(torch.float16)
    try:
        rows = gistkern.patch_llama(model).inner.gist_embeddings.weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rows, gistkern.patch_llama(make_model()).inner.gist_embeddings.weight)


class Quantized(nn.Module):
    """An embedding whose bytes are none of its values."""

    def __init__(self, embedding):
        super().__init__()
        self.scale = embedding.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((embedding.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, ids):
        return self.weight[ids].double() * self.scale[ids]


def test_rows_are_drawn_from_what_the_embedding_computes(model):
    expected = gistkern.patch_llama(make_model()).inner.gist_embeddings.weight
    model.set_input_embeddings(Quantized(model.get_input_embeddings()))
    handle = gistkern.patch_llama(model)
    rows = handle.inner.gist_embeddings.weight
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows, expected, rtol=0.1, atol=5e-3)
    model(stream(handle))


@torch.no_grad()
def test_a_model_changes_dtype_after_patching(model):
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    ids = stream(handle)
    expected = model(ids).logits
    found = model.float()(ids, use_cache=False).logits
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert handle.inner.gist_embeddings.settings.dtype == torch.int64
    with torch.inference_mode():
        model.bfloat16()(ids)
        handle.warn_if_untrained()


def test_unpatch_leaves_other_peoples_wrappers(model):
    handle = gistkern.patch_llama(model)
    ours = model.generate
    model.generate = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
    handle.unpatch()
    assert model.generate is theirs
    assert repr(handle).startswith("GistHandle(LlamaForCausalLM, num_gist_tokens=10")
