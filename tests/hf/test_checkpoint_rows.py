"""Gist rows and settings in checkpoints and adapters: they come back, or it is an error. Never a silent loss."""

import json

import pytest
import torch
from conftest import make_model, random_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import gistkern

SETTINGS = {"num_gist_tokens": 3, "positions": "gist_first", "sink_tokens": 2}


def trained(model, handle):
    """Move every trainable parameter, so that fresh values cannot pass for saved ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)


def stream(handle):
    return torch.cat([random_ids(1, 9), torch.tensor([handle.gist_token_ids]), random_ids(1, 4, 2)], 1)


@pytest.fixture
def checkpoint(model, tmp_path):
    handle = gistkern.patch_llama(model, **SETTINGS)
    trained(model, handle)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        return tmp_path / "model", stream(handle), model(stream(handle)).logits


@pytest.mark.parametrize("load", [LlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["settings-from-checkpoint", "settings-repeated"])
def test_save_pretrained_round_trip(checkpoint, load, settings):
    path, ids, expected = checkpoint
    model = load.from_pretrained(path).eval()
    handle = gistkern.patch_llama(model, **settings)
    assert (len(handle.gist_token_ids), handle.positions, handle.sink_tokens) == (3, "gist_first", 2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_sharded_round_trip(model, tmp_path):
    handle = gistkern.patch_llama(model, **SETTINGS)
    trained(model, handle)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    gistkern.patch_llama(again)
    assert torch.equal(again.model.gist_embeddings.weight, model.model.gist_embeddings.weight)


def test_contradicting_settings_are_refused(checkpoint):
    model = LlamaForCausalLM.from_pretrained(checkpoint[0])
    with pytest.raises(ValueError, match="num_gist_tokens=5 contradicts the checkpoint, which was trained with 3"):
        gistkern.patch_llama(model, num_gist_tokens=5)


def test_a_checkpoint_without_its_rows_is_refused(checkpoint):
    path = checkpoint[0]
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.gist_embeddings.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="has gist settings but no rows"):
        gistkern.patch_llama(model)


def test_rows_of_another_shape_are_refused(checkpoint):
    path = checkpoint[0]
    config = json.loads((path / "config.json").read_text())
    config["gistkern"]["num_gist_tokens"] = 4
    (path / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match=r"gist rows are \(3, 64\), expected \(4, 64\)"):
        gistkern.patch_llama(model)


def test_unpatched_model_saves_as_ever(model, tmp_path):
    gistkern.patch_llama(model).unpatch()
    model.save_pretrained(tmp_path)
    assert "gistkern" not in json.loads((tmp_path / "config.json").read_text())
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "gist" in name]


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["gist_embeddings"]}


def test_adapter_round_trip(tmp_path):
    model = make_model()
    handle = gistkern.patch_llama(model, **SETTINGS)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    assert sum(p.numel() for p in handle.trainable_parameters()) == 3 * 64
    frozen = {name for name, p in adapted.named_parameters() if not p.requires_grad}
    assert any("embed_tokens" in name for name in frozen), "only the new rows train"
    trained(adapted, handle)
    ids = stream(handle)
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path)
    rows = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "gist_embeddings" in name]
    assert any(name.endswith("weight") for name in rows)

    again = make_model()
    gistkern.patch_llama(again, **SETTINGS)
    loaded = PeftModel.from_pretrained(again, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
        cache = gistkern.compress(loaded, ids[:, :9])
        out = loaded.generate(input_ids=ids[:, 12:], past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


def test_adapter_that_would_lose_the_rows_is_refused():
    """The classic loss: LoRA trains, the new embeddings neither train nor get saved."""
    model = make_model()
    handle = gistkern.patch_llama(model)
    adapted = get_peft_model(model, LoraConfig(**{**LORA, "modules_to_save": None}))
    with pytest.raises(ValueError, match=r'pass modules_to_save=\["gist_embeddings"\]'):
        adapted(stream(handle))


def test_adapter_trained_with_other_settings_is_refused(tmp_path):
    model = make_model()
    gistkern.patch_llama(model, **SETTINGS)
    get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path)
    other = make_model()
    handle = gistkern.patch_llama(other, **{**SETTINGS, "positions": "absolute"})
    loaded = PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match=r"trained with num_gist_tokens=3, .*positions='gist_first', sink_tokens=2"):
        loaded(stream(handle))


def test_patching_after_peft_is_refused():
    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="patch the model before wrapping it with peft"):
        gistkern.patch_llama(adapted)


def test_adapter_trains_and_generates_with_gradient_checkpointing():
    model = make_model(dtype=torch.float32)
    handle = gistkern.patch_llama(model, num_gist_tokens=2)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = stream(handle)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted.train()(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert handle.trainable_parameters()[0].grad.abs().sum() > 0


def test_an_adapter_loaded_before_patching_is_refused(tmp_path):
    model = make_model()
    gistkern.patch_llama(model, **SETTINGS)
    get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path)
    late = make_model()
    PeftModel.from_pretrained(late, tmp_path)
    with pytest.raises(ValueError, match=r"gistkern\.load\(folder\), or patch the base before PeftModel"):
        gistkern.patch_llama(late, **SETTINGS)


def test_the_split_into_segment_gists_is_checked(tmp_path):
    model = make_model()
    gistkern.patch_llama(model, num_gist_tokens=3, num_segment_gist_tokens=2)
    get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path)
    other = make_model()
    gistkern.patch_llama(other, num_gist_tokens=2, num_segment_gist_tokens=3)
    with pytest.raises(ValueError, match="trained with num_gist_tokens=3, num_segment_gist_tokens=2"):
        PeftModel.from_pretrained(other, tmp_path)(random_ids(1, 4))


def test_unpatching_and_patching_a_checkpoint_again_keeps_its_rows(checkpoint):
    path, ids, expected = checkpoint
    model = LlamaForCausalLM.from_pretrained(path).eval()
    gistkern.patch_llama(model).unpatch()
    gistkern.patch_llama(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_a_cache_of_another_adapter_is_refused(tmp_path):
    model = make_model()
    gistkern.patch_llama(model, **SETTINGS)
    adapted = get_peft_model(model, LoraConfig(**LORA)).eval()
    cache = gistkern.compress(adapted, random_ids(1, 9))
    cache.save(tmp_path / "cache")
    adapted.add_adapter("other", LoraConfig(**LORA, init_lora_weights=False))
    gistkern.GistCache.load(tmp_path / "cache", model)  # an idle adapter changes nothing
    adapted.set_adapter("other")
    with pytest.raises(ValueError, match="written by another model"):
        gistkern.GistCache.load(tmp_path / "cache", model)


def test_ids_of_a_tokenizer_come_back_without_it(tmp_path):
    from test_patch import Tokenizer

    model = make_model()
    gistkern.patch_llama(model, Tokenizer(90), num_gist_tokens=2)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    with gistkern.patch_llama(again) as handle:
        assert handle.gist_token_ids == [90, 91]
    with pytest.raises(ValueError, match="begin at id 95, the checkpoint's at 90"):
        gistkern.patch_llama(again, Tokenizer(95))
