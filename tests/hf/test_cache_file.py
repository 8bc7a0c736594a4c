"""A compressed document on disk: what comes back, and every way a file can be wrong."""

import json

import pytest
import torch
from conftest import make_model, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gistkern


@pytest.fixture
def patched(model):
    return model, gistkern.patch_llama(model, num_gist_tokens=3)


@pytest.fixture
def saved(patched, tmp_path):
    cache = gistkern.compress(patched[0], random_ids(2, 30))
    path = tmp_path / "context.safetensors"
    cache.save(path)
    return cache, path


def test_a_loaded_cache_answers_as_the_saved_one(patched, saved):
    model, _ = patched
    cache, path = saved
    question = random_ids(2, 4)
    expected = model(question, past_key_values=cache).logits
    for arguments in ({}, {"model": model}):
        loaded = gistkern.GistCache.load(path, **arguments)
        assert torch.equal(model(question, past_key_values=loaded).logits, expected)
    assert path.stat().st_size < 20_000
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_a_used_cache_keeps_its_tail(patched, saved, tmp_path):
    model, _ = patched
    cache, _ = saved
    model(random_ids(2, 4), past_key_values=cache)
    cache.save(tmp_path / "used.safetensors")
    loaded = gistkern.GistCache.load(tmp_path / "used.safetensors", model)
    assert torch.equal(
        model(random_ids(2, 2), past_key_values=loaded).logits, model(random_ids(2, 2), past_key_values=cache).logits
    )
    assert loaded.state.fed == 6


def test_other_weights_are_refused_at_load_and_at_first_use(patched, saved):
    model, handle = patched
    _, path = saved
    with torch.no_grad():
        handle.trainable_parameters()[0][0, 0] += 1
    with pytest.raises(ValueError, match="written by another model"):
        gistkern.GistCache.load(path, model)
    unchecked = gistkern.GistCache.load(path)
    with pytest.raises(ValueError, match="written by another model"):
        model(random_ids(2, 3), past_key_values=unchecked)


def test_one_training_step_makes_it_another_model(patched, saved):
    model, _ = patched
    _, path = saved
    optimizer = torch.optim.SGD([model.model.layers[1].mlp.up_proj.weight], lr=0.1)
    model(random_ids(1, 8), labels=random_ids(1, 8)).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="written by another model"):
        gistkern.GistCache.load(path, model)


def test_other_position_scheme_is_refused(patched, saved):
    model, handle = patched
    handle.unpatch()
    with (
        gistkern.patch_llama(model, num_gist_tokens=3, positions="gist_first"),
        pytest.raises(ValueError, match="written with positions='absolute', the model is patched with"),
    ):
        gistkern.GistCache.load(saved[1], model)


def test_other_dtype_is_refused(saved):
    model = make_model(dtype=torch.float32)
    with gistkern.patch_llama(model, num_gist_tokens=3), pytest.raises(ValueError, match=r"holds torch\.float64"):
        gistkern.GistCache.load(saved[1], model)


def test_unpatched_model_is_refused(patched, saved):
    model, handle = patched
    handle.unpatch()
    with pytest.raises(ValueError, match="knows no gist tokens"):
        gistkern.GistCache.load(saved[1], model)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1], ids=lambda k: f"keep={k}")
def test_torn_file(saved, keep):
    _, path = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep])
    with pytest.raises(ValueError, match="is torn or no safetensors file"):
        gistkern.GistCache.load(path)


def test_flipped_bit(saved):
    _, path = saved
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum does not match"):
        gistkern.GistCache.load(path)


def test_changed_header(saved):
    _, path = saved
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["gistkern"])
    header["positions"] = "gist_first"
    save_file(load_file(path), path, metadata={"gistkern": json.dumps(header)})
    with pytest.raises(ValueError, match="checksum does not match"):
        gistkern.GistCache.load(path)


def test_foreign_safetensors(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a gist cache of format 'gistkern-cache-1'"):
        gistkern.GistCache.load(tmp_path / "x.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        gistkern.GistCache.load(tmp_path / "none.safetensors")


def test_a_failed_save_keeps_the_old_file(saved, monkeypatch):
    cache, path = saved
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_empty_cache_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="the cache is empty"):
        gistkern.GistCache().save(tmp_path / "x")
