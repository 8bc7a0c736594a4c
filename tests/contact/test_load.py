"""`gistkern.load`: what training saved comes back by one call, adapters and checkpoints alike; else it says why not."""

import json
import re
import shutil

import pytest
import torch
from contact_cases import LORA, WITH_ROWS, make_model, random_ids, train
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from training_oracle import make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gistkern


@torch.no_grad()
def read(model):
    """Logits behind a compressed context."""
    cache = gistkern.compress(model.eval(), random_ids(11) % 60 + 1, segment_length=4)
    return model(random_ids(5, 2) % 60, past_key_values=cache).logits


def saved(folder, peft=True, tokenizer=None, notes=None, sizes=None, **settings):
    """A base folder, and beside it what training leaves; returns the trained model's logits."""
    model = make_model(**({"vocab_size": 70} if tokenizer else {}), **(sizes or {}))
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    handle = gistkern.patch(model, tokenizer, **settings)
    handle.record(**(notes or {}))
    if peft:
        model = get_peft_model(model, LoraConfig(**WITH_ROWS, task_type="CAUSAL_LM"))
    train(handle)
    model.save_pretrained(folder / "trained")
    if peft and notes:
        (folder / "trained" / "gistkern.json").write_text(json.dumps(handle.arguments()))
    return read(model)


SETTINGS = {
    "plain": {},
    "all": {"num_gist_tokens": 3, "positions": "gist_first", "sink_tokens": 2, "num_segment_gist_tokens": 2},
}


@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "checkpoint"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("words", [False, True], ids=["ids", "tokenizer"])
def test_what_was_saved_comes_back(tmp_path, peft, settings, words):
    """Also with gist tokens that a tokenizer gave ids inside a padded vocabulary, and without gistkern.json."""
    tokenizer = make_tokenizer() if words else None
    expected = saved(tmp_path, peft, tokenizer, **settings)
    if words:
        tokenizer.save_pretrained(tmp_path / "trained")
    model, known, handle = gistkern.load(tmp_path / "trained")
    assert torch.equal(read(model), expected)
    assert handle.settings == gistkern.hf.settings.GistSettings(**settings)
    assert (known is None) == (not words)
    assert not model.training
    if words:
        assert known.convert_tokens_to_ids("<gist_0>") == handle.first_id == 63
    else:
        make_tokenizer().save_pretrained(tmp_path / "base")  # which knows no gist tokens, and whose words end elsewhere
        assert torch.equal(read(gistkern.load(tmp_path / "trained")[0]), expected)


def test_a_base_that_has_moved_is_named(tmp_path):
    expected = saved(tmp_path)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=re.escape(f"no folder '{tmp_path}/base'") + ".*pass base="):
        gistkern.load(tmp_path / "trained")
    model, _, handle = gistkern.load(tmp_path / "trained", base=tmp_path / "elsewhere")
    assert torch.equal(read(model), expected)
    assert handle.adapter == str(tmp_path / "trained")
    path = tmp_path / "trained" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base model: pass base="):
        gistkern.load(tmp_path / "trained")


@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "checkpoint"])
def test_how_contexts_were_made_comes_back(tmp_path, peft):
    saved(tmp_path, peft, notes={"segment_length": 6, "segment_overlap": 2, "chat": True, "context_prefix": [1]})
    _, _, handle = gistkern.load(tmp_path / "trained")
    assert vars(handle.training) == {"context_prefix": [1], "segment_length": 6, "segment_overlap": 2, "chat": True}
    make_tokenizer().save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"begin with \[1\].*this tokenizer begins them with no special token"):
        gistkern.load(tmp_path / "trained")


@pytest.mark.parametrize("field", [{"segment_length": 0}, {"segment_overlap": 3}, {"chat": 1}, {"chats": True}])
def test_a_record_is_checked(tmp_path, field):
    saved(tmp_path, peft=False, notes={"chat": True})
    config = tmp_path / "trained" / "config.json"
    found = json.loads(config.read_text())
    found["gistkern"] |= field
    config.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f'entry "gistkern" in config.json of .*{next(iter(field))}'):
        gistkern.load(tmp_path / "trained")


def broken(name):
    """Something is wrong with the trained folder: what, and what is said."""

    def without_rows(folder):
        base = make_model()
        base.name_or_path = str(folder.parent / "base")
        get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(folder)

    def strip(folder, ending):
        path = folder / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if not key.endswith(ending)}, path)

    def settings(folder, numbers):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = next(key for key in tensors if key.endswith("gist_embeddings.settings"))
        save_file({**tensors, name: torch.tensor(numbers)}, path)

    def in_a_run(folder):
        aside = folder.rename(folder.parent / "aside")
        folder.mkdir()
        aside.rename(folder / "checkpoint-7")

    cases = {
        "no rows": (without_rows, "was trained without modules_to_save"),
        "no settings": (lambda f: strip(f, "settings"), "holds no gist settings"),
        "strange": (lambda f: settings(f, [3, 0, 9, 1, 100]), "holds no gist settings"),
        "other ids": (lambda f: settings(f, [10, 0, 0, 1, 99]), "begin at id 99, those of this base"),
        "torn": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"torn"), "cannot read .*adapter_model"),
        "pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "by safetensors"),
        "torn json": (lambda f: (f / "gistkern.json").write_text("{"), "gistkern.json is torn"),
        "other json": (lambda f: (f / "gistkern.json").write_text('{"num_gist_tokens": 4}'), "not of one training"),
        "unknown json": (lambda f: (f / "gistkern.json").write_text('{"model": 4}'), "not of one training"),
        "not there": (shutil.rmtree, "there is no folder"),
        "a run": (in_a_run, "the folders checkpoint-7 in it do"),
    }
    return cases if name is None else cases[name]


@pytest.mark.parametrize("name", broken(None))
def test_what_is_wrong_with_an_adapter_is_said(tmp_path, name):
    saved(tmp_path)
    spoil, said = broken(name)
    spoil(tmp_path / "trained")
    with pytest.raises(ValueError, match=said):
        gistkern.load(tmp_path / "trained")


def test_a_model_without_gist_rows_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="was not saved while patched"):
        gistkern.load(tmp_path / "base")
    with pytest.raises(ValueError, match="is no peft adapter: leave base out"):
        gistkern.load(tmp_path / "base", base=tmp_path / "base")


def test_who_has_lost_the_patch_is_told_of_load(tmp_path):
    saved(tmp_path)
    lost = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "trained")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    cache = gistkern.compress(gistkern.load(tmp_path / "trained")[0], random_ids(5))
    for call in (
        lambda: gistkern.compress(lost, random_ids(5)),
        lambda: gistkern.patch(lost),
        lambda: gistkern.compress(plain, random_ids(5)),
        lambda: plain.generate(random_ids(3), past_key_values=cache),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"gistkern\.load\(folder\)"):
            call()


def test_a_base_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    saved(tmp_path, sizes={"hidden_size": 128, "intermediate_size": 192})  # what bitsandbytes packs for AVX512-BF16
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model, _, handle = gistkern.load(tmp_path / "trained", quantization_config=four_bits)
    assert type(handle.inner.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.isfinite(read(model)).all()
    assert torch.equal(
        handle.trainable_parameters()[0].detach(),
        gistkern.load(tmp_path / "trained")[2].trainable_parameters()[0].detach(),
    )


def test_only_the_rows_train_once_the_base_is_frozen():
    model = make_model()
    handle = gistkern.patch(model, num_gist_tokens=3)
    assert [p.shape for p in handle.freeze_base()] == [(3, 32)]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.gist_embeddings.weight"]
    model(torch.tensor([[5, 100, 101, 102, 7]]), labels=torch.tensor([[-100, -100, -100, -100, 7]])).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.gist_embeddings.weight.grad.abs().sum() > 0


def test_freezing_leaves_what_adapters_train():
    model = make_model()
    handle = gistkern.patch(model, num_gist_tokens=3)
    adapted = get_peft_model(model, LoraConfig(**WITH_ROWS))
    trains = {name for name, p in adapted.named_parameters() if p.requires_grad}
    for parameter in adapted.parameters():
        parameter.requires_grad_(parameter.requires_grad or parameter.shape == (100, 32))
    kept = handle.freeze_base()
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trains
    assert len(kept) == len(trains) > 1


def test_public_names_are_what_dir_shows():
    shown = dir(gistkern)
    assert shown == sorted([*gistkern.__all__, "backends", "demo", "serving", "testing", "training"])
    assert all(getattr(gistkern, name) is not None for name in shown if name != "serving")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        gistkern.lode  # noqa: B018


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 48}, {"vocab_size": 101}]
)
def test_a_base_that_does_not_fit_is_refused(tmp_path, changes):
    saved(tmp_path)
    make_model(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"does not fit the base|begin at id 100, those of this base"):
        gistkern.load(tmp_path / "trained", base=tmp_path / "other")


def test_an_adapter_that_lost_a_layer_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "trained" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "layers.1" not in key}, path)
    with pytest.raises(ValueError, match=r"does not fit the base.*missing adapter keys"):
        gistkern.load(tmp_path / "trained")


def test_a_resized_vocabulary_is_named(tmp_path):
    """peft saves the whole embedding then, for which a base of the old size has no place."""
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(104)
    gistkern.patch(model)
    model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(**WITH_ROWS, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "trained")
    with pytest.raises(
        ValueError, match=r"pass (base=, the model that it was trained on|the base that it was trained)"
    ):
        gistkern.load(tmp_path / "trained")
    model = make_model()
    model.resize_token_embeddings(104)
    model.save_pretrained(tmp_path / "resized")
    again = gistkern.load(tmp_path / "trained", base=tmp_path / "resized")[0]
    assert again.get_input_embeddings().weight.shape[0] == 104


def test_an_adapter_over_a_trained_checkpoint_has_its_own_record(tmp_path):
    saved(tmp_path, peft=False, notes={"segment_length": 4})
    model, _, handle = gistkern.load(tmp_path / "trained")
    model.name_or_path = str(tmp_path / "trained")
    handle.record(segment_length=8)
    adapted = get_peft_model(model, LoraConfig(**WITH_ROWS, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "gistkern.json").write_text(json.dumps(handle.arguments()))
    again, _, handle = gistkern.load(tmp_path / "adapter")
    assert handle.training.segment_length == 8
    assert torch.equal(read(again), read(adapted))


@pytest.mark.parametrize("name", ["runs/mine", "~/nowhere", "runs/mine/checkpoint-3", "runs/mine/", "./x", "/x/y", ""])
def test_a_mistyped_folder_is_said_to_be_none(name):
    with pytest.raises(ValueError, match="there is no folder"):
        gistkern.load(name)
    with pytest.raises(ValueError, match="load takes no subfolder"):
        gistkern.load(name, subfolder="x")


def test_an_unpatched_handle_says_so():
    handle = gistkern.patch(make_model())
    handle.unpatch()
    for call in (lambda: handle.training, handle.arguments, lambda: handle.record(chat=True)):
        with pytest.raises(ValueError, match="not patched any more"):
            call()


def test_a_record_is_a_copy():
    handle, prefix = gistkern.patch(make_model()), [1]
    handle.record(context_prefix=prefix)
    prefix.append(2)
    assert handle.training.context_prefix == [1]


def test_biases_that_an_adapter_trains_stay_trained():
    model = make_model(attention_bias=True)
    handle = gistkern.patch(model)
    adapted = get_peft_model(model, LoraConfig(**WITH_ROWS, bias="all"))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    handle.freeze_base()
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trained
    assert any(name.endswith("bias") for name in trained)


def test_a_revision_is_the_adapters(tmp_path, monkeypatch):
    """All of its files come from there, the weights too, and nothing of the base's."""
    saved(tmp_path)
    asked = []
    for kind in (PeftModel, AutoModelForCausalLM):
        original = kind.from_pretrained
        monkeypatch.setattr(
            kind,
            "from_pretrained",
            lambda *given, _kind=kind, _original=original, **options: (
                asked.append((_kind.__name__, options.get("revision"))) or _original(*given, **options)
            ),
        )
    gistkern.load(tmp_path / "trained", revision="v2")
    assert asked == [("AutoModelForCausalLM", None), ("PeftModel", "v2")]
