"""Where gist rows are found again: every way to load a checkpoint finds its own rows, or says what to do."""

import json
import logging
import shutil
import sys

import pytest
import torch
from conftest import make_model
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import gistkern


def save(folder, by, dtype=torch.float32, **options):
    """A checkpoint whose rows were moved by `by`; its rows."""
    model = make_model(dtype=torch.float32)
    (rows,) = gistkern.patch_llama(model, num_gist_tokens=3).trainable_parameters()
    with torch.no_grad():
        rows += by
    model.to(dtype).save_pretrained(folder, **options)
    return rows.detach().clone()


def rows_of(*where, **options):
    model = LlamaForCausalLM.from_pretrained(*where, **options)
    return gistkern.patch_llama(model).inner.gist_embeddings.weight.detach()


def test_variants_beside_each_other(tmp_path):
    full, half = save(tmp_path, 0.1), save(tmp_path, 0.1, torch.bfloat16, variant="bf16")
    assert half.dtype == torch.bfloat16
    assert torch.equal(rows_of(tmp_path, dtype=torch.float32), full)
    assert torch.equal(rows_of(tmp_path, variant="bf16"), half)


def test_variants_of_different_trainings_are_not_guessed(tmp_path):
    save(tmp_path, 0.1)
    save(tmp_path, 0.2, variant="ema")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hold different gist rows \(.*ema.*\).*instead of by subfolder= or variant="):
        gistkern.patch_llama(model)


def test_a_variant_alone_and_in_shards(tmp_path):
    rows = save(tmp_path, 0.1, variant="v", max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.v.json").exists()
    assert torch.equal(rows_of(tmp_path, variant="v"), rows)


def test_subfolders_are_told_apart(tmp_path):
    saved = {
        name: save(tmp_path / name, by) for name, by in (("checkpoint-5", 0.1), ("checkpoint-10", 0.2), (".", 0.3))
    }
    for name, rows in saved.items():
        assert torch.equal(rows_of(tmp_path, subfolder=name if name != "." else ""), rows)


def test_subfolders_without_digests_are_not_guessed(tmp_path):
    saved = {}
    for name, by in (("a", 0.1), ("b", 0.2)):
        saved[name] = save(tmp_path / name, by)
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["gistkern"]["rows"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(tmp_path, subfolder="a")
    with pytest.raises(ValueError, match=r"different gist rows .*from_pretrained\(folder\), instead of by subfolder="):
        gistkern.patch_llama(model)
    assert torch.equal(rows_of(tmp_path / "a"), saved["a"])


def test_revisions_of_a_cached_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--org--name"
    revisions = (("1" * 40, 0.1, torch.float32), ("2" * 40, 0.2, torch.bfloat16), ("3" * 40, 0.3, torch.float32))
    saved = {name: save(root / "snapshots" / name, by, dtype).float() for name, by, dtype in revisions}
    (root / "refs").mkdir()
    (root / "refs/main").write_text("1" * 40)
    for name, rows in saved.items():
        model = LlamaForCausalLM.from_pretrained(root / "snapshots" / name, dtype=torch.float32)
        model.config._name_or_path = "org/name"  # as the hub's name leaves it
        assert torch.equal(gistkern.patch_llama(model).inner.gist_embeddings.weight, rows)


def test_rows_that_are_not_the_saved_ones_are_said(tmp_path, caplog):
    save(tmp_path, 0.1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.gist_embeddings.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rows_of(tmp_path)
    assert "are not those that its config.json was saved with" in caplog.text


def test_a_relative_path_after_chdir_and_a_deleted_folder(tmp_path, monkeypatch):
    save(tmp_path / "model", 0.1)
    monkeypatch.chdir(tmp_path)
    relative, absolute = LlamaForCausalLM.from_pretrained("model"), LlamaForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"'model' .*no such folder \(seen from .*elsewhere\).*absolute path"):
        gistkern.patch_llama(relative)
    monkeypatch.chdir(tmp_path)
    gistkern.patch_llama(relative)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no such folder .* Patch before it is moved or deleted"):
        gistkern.patch_llama(absolute)


def test_a_state_dict_follows_the_patch(tmp_path):
    rows = save(tmp_path, 0.1)
    state, config = load_file(tmp_path / "model.safetensors"), AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"patch_llama\(model\); model.load_state_dict\(state_dict\)"):
        gistkern.patch_llama(LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state))
    config._name_or_path = ""
    model = LlamaForCausalLM(config)
    handle = gistkern.patch_llama(model)
    model.load_state_dict(state)
    assert torch.equal(handle.inner.gist_embeddings.weight, rows)
    assert not handle.untrained()


def test_a_pickle_is_not_read_and_its_rows_can_be_written_beside_it(tmp_path):
    rows = save(tmp_path, 0.1)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a pickle, which is not read here. Write them beside it: ") as error:
        gistkern.patch_llama(model)
    import safetensors.torch  # noqa: F401

    exec(
        str(error.value).split("Write them beside it: ")[1], {"torch": torch, "safetensors": sys.modules["safetensors"]}
    )
    assert torch.equal(rows_of(tmp_path), rows)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"low_cpu_mem_usage": True}, {"device_map": {"": "cpu"}}]
)
def test_how_it_is_loaded_does_not_matter(tmp_path, options):
    rows = save(tmp_path, 0.1)
    assert torch.equal(rows_of(tmp_path, **options), rows.to(options.get("dtype", torch.float32)))


def test_another_patch_of_the_config_does_not_keep_its_digest(tmp_path):
    save(tmp_path, 0.1)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    (rows,) = gistkern.patch_llama(model).trainable_parameters()
    with torch.no_grad():
        rows += 1
    assert "rows" not in model.config.gistkern
    model.save_pretrained(tmp_path / "again", state_dict=model.state_dict())
    assert torch.equal(rows_of(tmp_path / "again"), rows)


@pytest.mark.parametrize("before", [True, False], ids=["imported-before", "imported-after"])
def test_the_load_report_does_not_look_like_lost_data(tmp_path, caplog, monkeypatch, before):
    save(tmp_path, 0.1)
    if not before:
        monkeypatch.setattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected", None)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.INFO, logger="transformers")  # other tests may have silenced it
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ("UNEXPECTED" in caplog.text) is not before
    gistkern.patch_llama(model)
    assert ("gist rows taken from" in caplog.text) is not before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([1], r"expected an object, got \[1\]"),
        ("gist", "expected an object, got 'gist'"),
        ({"num_gist_tokens": ...}, "'num_gist_tokens' is missing"),
        ({"first_gist_id": ...}, "'first_gist_id' is missing"),
        ({"color": 1}, "'color' is unknown"),
        ({"num_gist_tokens": True}, "num_gist_tokens must be an int >= 1, got True"),
        ({"num_gist_tokens": 0}, "num_gist_tokens must be an int >= 1, got 0"),
        ({"num_gist_tokens": "3"}, "num_gist_tokens must be an int >= 1, got '3'"),
        ({"sink_tokens": -1}, "sink_tokens must be an int >= 0, got -1"),
        ({"sink_tokens": 1.0}, "sink_tokens must be an int >= 0, got 1.0"),
        ({"sink_tokens": 10**30}, r"sink_tokens must be less than 2\^31"),
        ({"num_segment_gist_tokens": None}, "num_segment_gist_tokens must be"),
        ({"positions": "rope"}, "unknown position scheme 'rope'"),
        ({"positions": ["absolute"]}, "unknown position scheme"),
        ({"first_gist_id": -5}, "first_gist_id must be an int >= 0, got -5"),
        ({"first_gist_id": 2**31 - 2}, r"must be less than 2\^31"),
        ({"ids_from_tokenizer": "no"}, "ids_from_tokenizer must be true or false"),
        ({"rows": 3}, "rows must be a digest"),
        ({"context_prefix": [True]}, "context_prefix"),
    ],
)
def test_settings_in_config_json_are_checked(tmp_path, change, message):
    save(tmp_path, 0.1)
    config = json.loads((tmp_path / "config.json").read_text())
    if isinstance(change, dict):
        block = config["gistkern"] | change
        config["gistkern"] = {name: value for name, value in block.items() if value is not ...}
    else:
        config["gistkern"] = change
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        gistkern.patch_llama(model)
    assert str(tmp_path) in str(error.value)
    assert model.config._attn_implementation == "sdpa"


def test_a_vocabulary_that_grew_over_the_gist_ids(tmp_path):
    rows = save(tmp_path, 0.1)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(102, mean_resizing=False)
    with pytest.raises(ValueError, match=r"lies inside the vocabulary of 102 .*gistkern\['first_gist_id'\] = 102"):
        gistkern.patch_llama(model)
    model.config.gistkern["first_gist_id"] = 102
    handle = gistkern.patch_llama(model)
    assert handle.gist_token_ids == [102, 103, 104]
    assert torch.equal(handle.inner.gist_embeddings.weight, rows)
    model.eval()(torch.tensor([[5, 100, 101, *handle.gist_token_ids, 7]]))
