"""peft around a patched model: what is in use counts, and gist rows that would be lost are named."""

import copy
import json

import pytest
import torch
from contact_cases import LORA, WITH_ROWS, make_model, patched, random_ids, train
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from training_oracle import make_tokenizer
from transformers import LlamaForCausalLM

import gistkern
from gistkern.hf.handle import handle_of


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids, use_cache=False).logits


def test_an_inactive_adapter_changes_nothing():
    model, handle, ids = patched(trained=False)
    adapted = get_peft_model(model, LoraConfig(**WITH_ROWS), adapter_name="gist")
    train(handle)
    expected = logits(adapted, ids)
    adapted.add_adapter("style", LoraConfig(**LORA))
    assert torch.equal(logits(adapted, ids), expected)
    gistkern.compress(adapted, random_ids(9))
    adapted.set_adapter("style")
    with pytest.raises(ValueError, match="'style' would neither train nor save the gist rows"):
        logits(adapted, ids)
    with adapted.disable_adapter():
        logits(adapted, ids)  # the base model, with the rows it was patched with
    adapted.delete_adapter("style")
    adapted.set_adapter("gist")
    assert torch.equal(logits(adapted, ids), expected)


def test_an_adapter_beside_trained_rows_may_leave_them_alone():
    model, handle, ids = patched()
    adapted = get_peft_model(model, LoraConfig(**LORA))
    before = handle.inner.gist_embeddings.weight.detach().clone()
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(handle.inner.gist_embeddings.weight, before)


def test_an_embedding_that_is_trained_too_brings_no_second_model():
    """peft copies the embedding, and whatever hangs on it."""
    model, _, ids = patched(trained=False)
    both = {**WITH_ROWS, "modules_to_save": ["gist_embeddings", "embed_tokens"]}
    adapted = get_peft_model(model, LoraConfig(**both))
    copied = copy.deepcopy(adapted)
    for one in (adapted, copied):
        embedding = one.get_input_embeddings().modules_to_save["default"]
        owners = [hook.__self__ for hook in embedding._forward_pre_hooks.values()]
        assert owners == [handle_of(one)]
        assert owners[0].model is one.get_base_model()
    assert torch.equal(logits(copied, ids), logits(adapted, ids))


@pytest.mark.parametrize("named", ["gist_embeddings", "model.gist_embeddings"])
def test_each_adapter_has_rows_of_its_own(named):
    model, handle, ids = patched(trained=False)
    config = {**WITH_ROWS, "modules_to_save": [named]}
    adapted = get_peft_model(model, LoraConfig(**config), adapter_name="a")
    adapted.add_adapter("b", LoraConfig(**config))
    found = []
    for name in ("a", "b"):
        adapted.set_adapter(name)
        train(handle, by=0.01 if name == "a" else 0.02)
        (rows,) = handle.trainable_parameters()
        assert rows is handle.inner.gist_embeddings.modules_to_save[name].weight
        found.append(logits(adapted, ids))
    assert not torch.equal(*found)
    adapted.set_adapter("a")
    assert torch.equal(logits(adapted, ids), found[0])
    merged = adapted.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(logits(merged, ids), found[0], rtol=0, atol=1e-4)
    gistkern.compress(merged, random_ids(9))
    handle.unpatch()


def test_merged_adapters_are_saved_and_come_back(tmp_path):
    model, handle, ids = patched(trained=False)
    adapted = get_peft_model(model, LoraConfig(**WITH_ROWS))
    train(handle)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    gistkern.patch_llama(again)
    assert torch.equal(logits(again, ids), logits(merged, ids))


def test_a_mixture_of_adapters_has_no_rows_and_says_so():
    model, handle, _ = patched(trained=False)
    adapted = get_peft_model(model, LoraConfig(**WITH_ROWS), adapter_name="gist")
    train(handle)
    adapted.add_adapter("style", LoraConfig(**LORA))
    adapted.add_weighted_adapter(["gist", "style"], [1.0, 1.0], "both", combination_type="linear")
    adapted.set_adapter("both")
    with pytest.warns(UserWarning, match="never trained"):
        handle_of(adapted).warn_if_untrained()


def test_an_adapter_on_an_unpatched_model_breaks_the_circle(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    gistkern.patch_llama(base, num_gist_tokens=3)
    get_peft_model(base, LoraConfig(**WITH_ROWS, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for call in (lambda: gistkern.compress(loaded, random_ids(5)), lambda: gistkern.patch_llama(loaded)):
        with pytest.raises(ValueError, match=r"loaded on a model that was not patched.*PeftModel\.from_pretrained"):
            call()
    base = make_model()
    gistkern.patch_llama(base, num_gist_tokens=3)
    gistkern.compress(PeftModel.from_pretrained(base, tmp_path / "adapter"), random_ids(5))


def test_rows_of_another_size_name_the_settings(tmp_path):
    model, *_ = patched(gists=3)
    get_peft_model(model, LoraConfig(**WITH_ROWS)).save_pretrained(tmp_path)
    other, *_ = patched(gists=4)
    with pytest.raises(RuntimeError, match=r"are \(3, 32\), the model is patched for \(4, 32\).*gistkern\.json"):
        PeftModel.from_pretrained(other, tmp_path)


def test_ids_that_a_tokenizer_gave_name_the_tokenizer(tmp_path):
    """The ids lie inside a padded vocabulary; gist tokens of a model without a tokenizer follow it."""
    model = make_model()
    gistkern.patch_llama(model, make_tokenizer(), num_gist_tokens=3)
    get_peft_model(model, LoraConfig(**WITH_ROWS)).save_pretrained(tmp_path)
    again = make_model()
    gistkern.patch_llama(again, num_gist_tokens=3)
    adapted = PeftModel.from_pretrained(again, tmp_path)
    with pytest.raises(ValueError, match=r"first id 63; .*patch it with the tokenizer of the training"):
        logits(adapted, random_ids(4))


def test_a_patched_model_unloads_and_is_patched_again():
    model, handle, ids = patched(trained=False)
    expected = logits(model, ids[:, :9])
    adapted = get_peft_model(model, LoraConfig(**WITH_ROWS))
    with pytest.raises(ValueError, match="patch the model before wrapping it with peft"):
        gistkern.patch_llama(adapted)
    handle.unpatch()
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, ids[:, :9]), expected)
    with pytest.raises(ValueError, match="loaded on a model that was not patched"):
        gistkern.patch_llama(model)
    adapted.unload()
    with gistkern.patch_llama(model):
        torch.testing.assert_close(logits(model, ids[:, :9]), expected)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused(config):
    model, _, ids = patched()
    adapted = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="do not go together"):
        gistkern.compress(adapted, random_ids(5))
    with pytest.raises((ValueError, TypeError), match=r"prompt tuning|reads a GistCache"):
        logits(adapted, ids)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        lambda model: get_peft_model(model, LoraConfig(**LORA)),
        lambda model: torch.compile(nn.DataParallel(get_peft_model(model, LoraConfig(**LORA))), backend="eager"),
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["compiled", "parallel", "peft", "all", "averaged"],
)
def test_the_handle_is_seen_through_wrappers(wrap):
    model, handle, _ = patched()
    found = handle_of(wrap(model))
    assert found.gist_token_ids == handle.gist_token_ids
    assert found is handle or found.model is not model, "a copy has a handle of its own"
    assert handle_of(model.model) is handle


def test_settings_of_the_training_patch_a_fresh_model():
    _, handle, _ = patched()
    assert gistkern.patch_llama(make_model(), **json.loads(json.dumps(handle.arguments()))).settings == handle.settings
