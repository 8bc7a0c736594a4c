"""accelerate: weights that lie elsewhere between calls, before and after patching."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from contact_cases import make_model, patched, random_ids, train
from transformers import LlamaForCausalLM

import gistkern

SPREAD = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def offload(model, how, folder):
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "cpu, buffers too":
        return cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    if how == "disk":
        return disk_offload(model, folder, execution_device=torch.device("cpu"))
    places = dict(SPREAD)
    if hasattr(model.model, "gist_embeddings"):
        places["model.gist_embeddings"] = "disk"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


HOW = ["cpu", "cpu, buffers too", "disk", "dispatch"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("first", ["patch", "offload"])
@torch.no_grad()
def test_offloaded_weights_give_the_same(how, first, tmp_path):
    plain, handle, ids = patched(trained=False)
    question = ids[:, -4:]
    cache = gistkern.compress(plain, ids[:, :9])
    expected = plain(ids, use_cache=False).logits, plain(question, past_key_values=cache).logits
    model = make_model()
    if first == "offload":
        offload(model, how, tmp_path)
    handle = gistkern.patch_llama(model, num_gist_tokens=3)
    assert not handle.inner.gist_embeddings.weight.is_meta
    assert handle.untrained()
    if first == "patch":
        offload(model, how, tmp_path)
    assert torch.equal(model(ids, use_cache=False).logits, expected[0])
    cache = gistkern.compress(model, ids[:, :9])
    assert torch.equal(model(question, past_key_values=cache).logits, expected[1])
    gistkern.compress(model, ids[:, :9].tolist()).save(tmp_path / "context.safetensors")
    loaded = gistkern.GistCache.load(tmp_path / "context.safetensors", model)
    assert torch.equal(model(question, past_key_values=loaded.clone()).logits, expected[1])
    assert model.generate(question, past_key_values=loaded, max_new_tokens=3).shape == (1, 7)
    handle.unpatch()
    remove_hook_from_submodules(model)


@torch.no_grad()
def test_a_checkpoint_spread_over_memory_and_disk(tmp_path):
    model, _, ids = patched()
    model.save_pretrained(tmp_path / "model")
    expected = model(ids, use_cache=False).logits
    again = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=SPREAD, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    handle = gistkern.patch_llama(again)
    assert torch.equal(again(ids, use_cache=False).logits, expected)
    gistkern.compress(again, random_ids(7))
    again.save_pretrained(tmp_path / "again")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    gistkern.patch_llama(back)
    assert torch.equal(back(ids, use_cache=False).logits, expected)
    handle.unpatch()


def test_weights_that_are_nowhere_are_refused():
    """A model on the meta device can be patched, to count its parameters; nothing can be computed with it."""
    with torch.device("meta"):
        model = make_model()
    handle = gistkern.patch_llama(model)
    assert all(parameter.is_meta for parameter in handle.trainable_parameters())
    ids = torch.tensor([[1, 2, 3]])
    for compute in (lambda: model(ids, use_cache=False), lambda: gistkern.compress(model, ids)):
        with pytest.raises(ValueError, match="on the meta device"):
            compute()


def test_a_prepared_model_keeps_its_handle():
    from accelerate import Accelerator

    from gistkern.hf.handle import handle_of

    model, handle, ids = patched(trained=False)
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    before = handle.inner.gist_embeddings.weight.detach().clone()
    accelerator.backward(prepared(ids, labels=ids).loss)
    optimizer.step()
    assert handle_of(prepared) is handle
    assert not torch.equal(handle.inner.gist_embeddings.weight, before)
    assert not handle.untrained()
    train(handle)
