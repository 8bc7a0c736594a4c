"""GistTrainer: right losses however a batch is split, logs and checkpoints that come back, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, processors
from training_cases import arguments, lora, make_features, make_model, patched
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

import gistkern
from gistkern.training import (
    Curriculum,
    GistCallback,
    GistDataCollator,
    GistTrainer,
    Objectives,
    Stage,
    answer_loss,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
ALL = Objectives(answer=1.0, distillation=0.5, reconstruction=0.25)


def make_trainer(
    folder, scheme="hierarchical", peft=False, dtype=torch.float64, trainer=GistTrainer, tokenizer=0, **given
):
    changes = given.pop("arguments", {})
    model, handle, segments = patched(scheme, dtype=dtype)
    if peft:
        torch.manual_seed(1)
        model = lora(model, init_lora_weights=False, lora_dropout=0.0).to(dtype)
    collate = given.pop("collate", None) or GistDataCollator(tokenizer, handle, **segments, teacher=True, cue=[9])
    given.setdefault("train_dataset", make_features(16))
    return trainer(model, arguments(folder, **changes), data_collator=collate, **given)


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_equal_weights(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or CLOSE), msg=name)


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(log):
    return [{key: entry[key] for key in ("step", "loss", "answer")} for entry in log if "loss" in entry]


# ---- losses


@pytest.mark.parametrize("peft", [False, True])
def test_gradient_accumulation_changes_nothing(tmp_path, peft):
    """One batch of four, or four of one: answers and spans differ in length, so a mean of means would differ."""
    whole, split = tmp_path / "whole", tmp_path / "split"
    results = []
    for folder, changes in ((whole, {}), (split, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})):
        trainer = make_trainer(folder, peft=peft, objectives=ALL, arguments=changes)
        before = weights(trainer)
        trainer.train()
        results.append(weights(trainer))
    assert any((results[0][name] - before[name]).abs().max() > 1e-3 for name in before)
    assert_equal_weights(*results)
    for one, other in zip(entries(whole)[:-1], entries(split)[:-1], strict=True):
        assert one == pytest.approx(other, rel=1e-6), "losses, their parts, accuracies, gradient norms"


def test_the_logged_numbers_are_those_of_the_batch(tmp_path):
    trainer = make_trainer(
        tmp_path, objectives=ALL, arguments={"max_steps": 1, "train_sampling_strategy": "sequential"}
    )
    batch = trainer.data_collator(make_features(16)[:4])
    with torch.no_grad():
        losses = ALL(trainer.model.train(), batch)
        right, wanted, exact, samples = losses.tail.counts().tolist()
    trainer.train()
    entry = entries(tmp_path)[0]
    assert entry["loss"] == pytest.approx(losses.total.item(), rel=1e-6)
    assert entry == {**entry, **{name: pytest.approx(value.item()) for name, value in losses.parts.items()}}
    assert (entry["token_accuracy"], entry["exact"]) == (right / wanted, exact / samples)
    assert wanted > samples == 4


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for changes in ({}, {"gradient_checkpointing": True}):
        trainer = make_trainer(tmp_path, peft=True, objectives=ALL, arguments={**changes, "max_steps": 2})
        trainer.train()
        results.append(weights(trainer))
    assert trainer.model.get_base_model().model.layers[0].gradient_checkpointing
    assert_equal_weights(*results)


def test_bf16_autocast(tmp_path):
    logs = []
    for changes in ({}, {"bf16": True}):
        trainer = make_trainer(
            tmp_path, dtype=torch.float32, peft=True, objectives=ALL, arguments={**changes, "max_steps": 2}
        )
        trainer.train()
        logs.append(losses_of(entries(tmp_path)))
        assert all(parameter.dtype == torch.float32 for parameter in weights(trainer).values())
    for plain, half in zip(*logs, strict=True):
        assert plain["loss"] != half["loss"]
        assert plain["loss"] == pytest.approx(half["loss"], rel=0.03)


def test_a_plain_trainer_takes_the_batches_too(tmp_path):
    """The collator alone is enough for transformers' own Trainer: its loss is the same."""
    logs = []
    for trainer in (Trainer, GistTrainer):
        given = {"collate": GistDataCollator(0, patched("hierarchical")[1], segment_length=6)}
        if trainer is Trainer:
            given["callbacks"] = [GistCallback()]
        made = make_trainer(tmp_path, trainer=trainer, arguments={"remove_unused_columns": False}, **given)
        made.train()
        logs.append([entry["loss"] for entry in entries(tmp_path) if "loss" in entry])
    assert len(logs[0]) == 3
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_columns_that_nobody_reads_are_removed_or_refused(tmp_path):
    data = [{**feature, "depth": 0.5} for feature in make_features(8)]
    make_trainer(tmp_path, train_dataset=data).train()
    with pytest.raises(ValueError, match=r"unknown fields \['depth'\]"):
        make_trainer(tmp_path, train_dataset=data, arguments={"remove_unused_columns": False}).train()


def test_a_data_worker_makes_the_same_batches(tmp_path):
    logs = []
    for workers in (0, 1):
        changes = {"max_steps": 1, "dataloader_num_workers": workers}
        make_trainer(tmp_path, objectives=ALL, arguments=changes).train()
        logs.append(entries(tmp_path)[0])
    assert logs[0] == logs[1]


def test_tensorboard_gets_the_parts(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    make_trainer(tmp_path, objectives=ALL, arguments={"report_to": "tensorboard"}).train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    logged = {entry["step"]: entry["distillation"] for entry in entries(tmp_path) if "loss" in entry}
    assert len(logged) == 3
    assert {e.step: e.value for e in events.Scalars("train/distillation")} == pytest.approx(logged, rel=1e-5)


# ---- checkpoints


def settled(folder, peft, steps=6, resume=None, curriculum=None, **changes):
    trainer = make_trainer(
        folder,
        peft=peft,
        dtype=torch.float32,
        objectives=ALL,
        curriculum=curriculum,
        arguments={"max_steps": steps, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3, **changes},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def stages():
    return Curriculum([Stage(2, gate=1.0, tokens=(4, 9)), Stage(9, tokens=(4, 20))])


@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, peft):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    first, second, third = stages(), stages(), stages()
    expected = settled(whole, peft, curriculum=first)
    settled(halved, peft, steps=4, curriculum=second)
    with (halved / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "torn')
    resumed = settled(halved, peft, resume=str(halved / "checkpoint-3"), curriculum=third)
    assert_equal_weights(weights(resumed), weights(expected), rtol=0, atol=0)
    assert third.state_dict() == first.state_dict()
    assert third.step == 6
    assert third.index == 1
    saved = json.loads((halved / "checkpoint-3" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["GistCallback"]["attributes"]["curriculum"]["step"] == 3
    steps = [entry["step"] for entry in entries(halved) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6], "the entries after the checkpoint are written again, the torn line is gone"
    for one, other in zip(losses_of(entries(halved)), losses_of(entries(whole)), strict=True):
        assert one == other
    assert not [path for path in (halved / "checkpoint-3").iterdir() if path.name.startswith("pytorch_model")]


def test_an_adapters_checkpoint_holds_what_was_trained_and_comes_back(tmp_path):
    trainer = settled(tmp_path, peft=True, steps=3)
    folder = tmp_path / "checkpoint-3"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name or "gist_embeddings" in name for name in tensors)
    trained = sum(value.numel() for value in weights(trainer).values())
    settings = sum(value.numel() for name, value in tensors.items() if name.endswith("settings"))
    assert sum(value.numel() for value in tensors.values()) == trained + settings
    assert not list(folder.glob("model*.safetensors"))
    settings = json.loads((folder / "gistkern.json").read_text())
    assert "context_prefix" not in settings, "ids were trained on, so nobody knows"
    base = make_model(torch.float32)
    gistkern.patch_llama(base, **settings)
    again = PeftModel.from_pretrained(base, folder)
    batch = trainer.data_collator(make_features(3))
    with torch.no_grad():
        mine, theirs = (
            answer_loss(model.eval(), batch["input_ids"], batch["labels"], batch["gist_layout"])
            for model in (trainer.model, again)
        )
    assert torch.equal(mine, theirs)


def test_a_full_checkpoint_comes_back(tmp_path):
    trainer = settled(tmp_path, peft=False, steps=3)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert gistkern.patch_llama(again).gist_token_ids == [60, 61, 62]
    assert torch.equal(again.model.gist_embeddings.weight, trainer.model.model.gist_embeddings.weight)
    assert not (tmp_path / "checkpoint-3" / "gistkern.json").exists(), "config.json holds the settings"


@pytest.mark.parametrize("peft", [False, True])
def test_a_checkpoint_says_what_contexts_began_with(tmp_path, peft):
    raw = Tokenizer(models.WordLevel({"<s>": 7, "?": 1, "a": 2}, unk_token="?"))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 7)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", pad_token="?")
    trainer = make_trainer(tmp_path, "single", peft, torch.float32, tokenizer=tokenizer)
    trainer.save_model()
    if peft:
        base = make_model(torch.float32)
        handle = gistkern.patch_llama(base, **json.loads((tmp_path / "gistkern.json").read_text()))
    else:
        handle = gistkern.patch_llama(LlamaForCausalLM.from_pretrained(tmp_path))
    assert handle.training.context_prefix == [7]
    GistDataCollator(tokenizer, handle)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match=r"begin with \[7\] \('<s>'\), this tokenizer begins them with no special"):
        gistkern.compress_corpus(handle.model, {"d": "a"}, tmp_path / "store", tokenizer)
    handle.unpatch()
    for wrong in ([1.5], "<s>", 7, [-1], [True], [2**31]):
        with pytest.raises(ValueError, match="context_prefix must be a list of token ids"):
            gistkern.patch_llama(make_model(), context_prefix=wrong)


# ---- curriculum


class Staged(torch.utils.data.Dataset):
    """Samples of the stage's length, from seed and place alone."""

    def __init__(self, curriculum):
        self.curriculum, self.seen = curriculum, []

    def __len__(self):
        return 400

    def __getitem__(self, place):
        least, _ = self.curriculum.stage.tokens
        self.seen.append(least)
        return {"context_ids": [1 + place % 50] * least, "question_ids": [3], "answer_ids": [7, 7]}


def test_the_curriculum_hears_every_step_and_ends_the_run(tmp_path):
    curriculum = Curriculum([Stage(3, gate=0.2, tokens=(5, 5)), Stage(4, tokens=(11, 11))], smoothing=0.5)
    data = Staged(curriculum)
    trainer = make_trainer(
        tmp_path, train_dataset=data, curriculum=curriculum, arguments={"max_steps": 90, "learning_rate": 0.3}
    )
    trainer.train()
    assert curriculum.finished
    log = [entry for entry in entries(tmp_path) if "loss" in entry]
    again = Curriculum(curriculum.stages, smoothing=0.5)
    for entry in log:
        again.update(entry["token_accuracy"])
        assert (entry["stage"], entry["running_accuracy"]) == (again.index, pytest.approx(again.running_accuracy))
    assert again.state_dict() == curriculum.state_dict()
    assert again.step == len(log) == trainer.state.global_step < 90
    changed = data.seen.index(11)
    assert set(data.seen[:changed]) == {5}
    assert set(data.seen[changed:]) == {11}
    first_of_second = next(entry["step"] for entry in log if entry["stage"] == 1)
    assert changed // 4 - first_of_second in (0, 1), "the batch loaded ahead is still of the stage before"


def test_resuming_without_the_curriculum_it_was_saved_with(tmp_path):
    settled(tmp_path, peft=False, steps=3)
    with pytest.raises(ValueError, match="the checkpoint holds no state of a curriculum"):
        settled(tmp_path, peft=False, resume=True, curriculum=stages())
    settled(tmp_path, peft=False, steps=3, curriculum=Curriculum([Stage(3, tokens=(1, 2))]))
    for given, message in (
        (stages(), "of another curriculum"),
        (Curriculum([Stage(3, tokens=(1, 2))]), "curriculum is finished"),
    ):
        with pytest.raises(ValueError, match=message):
            settled(tmp_path, peft=False, resume=True, curriculum=given)


# ---- evaluation


def test_evaluation_measures_the_answers(tmp_path):
    data = make_features(7, seed=5)
    trainer = make_trainer(tmp_path, objectives=ALL, eval_dataset=data, arguments={"per_device_eval_batch_size": 3})
    trainer.model.lm_head.weight.data[7] *= 3  # one token is said often, and often right
    for feature in data[:4]:
        feature["answer_ids"] = [7]
    batch = trainer.data_collator(data)
    with torch.no_grad():
        tail = Objectives()(trainer.model.eval(), batch).tail
    right, wanted, exact, samples = tail.counts().tolist()
    assert 0 < right < wanted
    found = trainer.evaluate()
    assert found["eval_token_accuracy"] == pytest.approx(right / wanted)
    assert found["eval_exact"] == pytest.approx(exact / samples)
    parts = [Objectives()(trainer.model, trainer.data_collator(data[i : i + 3])).parts["answer"] for i in (0, 3, 6)]
    assert found["eval_loss"] == pytest.approx(sum(p.item() * n for p, n in zip(parts, (3, 3, 1), strict=True)) / 7)
    assert entries_after_training(trainer, tmp_path)[-1]["eval_exact"] == found["eval_exact"]


def entries_after_training(trainer, folder):
    trainer.train()
    trainer.evaluate()
    return [entry for entry in entries(folder) if "eval_exact" in entry] or pytest.fail("evaluations are logged")


def test_metrics_of_ones_own_get_logits_and_the_labels_they_predict(tmp_path):
    data = make_features(3)
    got = {}

    def metrics(prediction):
        got["logits"], got["labels"] = prediction
        return {"n": len(prediction.label_ids)}

    trainer = make_trainer(tmp_path, eval_dataset=data, compute_metrics=metrics)
    assert trainer.evaluate()["eval_n"] == 3
    wanted = got["labels"] != -100
    assert got["logits"].shape == (*got["labels"].shape, 60)
    rows = torch.from_numpy(got["logits"][wanted])
    loss = torch.nn.functional.cross_entropy(rows, torch.from_numpy(got["labels"][wanted]))
    assert loss.item() == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert got["labels"][wanted].tolist() == np.concatenate([f["answer_ids"] for f in data]).tolist()


# ---- refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compute_loss_func": print}, "compute_loss_func would be ignored: pass objectives"),
        ({"arguments": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor would be ignored"),
        ({"arguments": {"restore_callback_states_from_checkpoint": True}}, "which is restored without it"),
        ({"callbacks": [GistCallback()]}, "adds a GistCallback itself"),
        ({"curriculum": stages(), "arguments": {"dataloader_num_workers": 2}}, "needs dataloader_num_workers=0"),
    ],
)
def test_refusals(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **given)


def test_more_refusals(tmp_path):
    with pytest.raises(ValueError, match="knows no gist tokens"):
        GistTrainer(make_model(), arguments(tmp_path), train_dataset=make_features(4))
    model, *_ = patched()
    with pytest.raises(ValueError, match=r'pass modules_to_save=\["gist_embeddings"\]'):
        GistTrainer(lora(model, modules_to_save=None), arguments(tmp_path))
    model, *_ = patched()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="after patching, which takes the gist mask off"):
        GistTrainer(model, arguments(tmp_path))
    model, *_ = patched()
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(ValueError, match="launch one process per GPU, with torchrun or accelerate"):
        GistTrainer(model, several, train_dataset=make_features(4))
    collate = GistDataCollator(0, patched()[1])
    with pytest.raises(ValueError, match=r"distillation needs batch\['teacher'\]"):
        make_trainer(tmp_path, scheme="single", collate=collate, objectives=ALL).train()
    collate = GistDataCollator(0, patched("hierarchical")[1], segment_length=6)
    plain = make_trainer(
        tmp_path,
        trainer=Trainer,
        collate=collate,
        callbacks=[GistCallback(stages())],
        arguments={"remove_unused_columns": False},
    )
    with pytest.raises(ValueError, match="needs the accuracy of each step, which GistTrainer measures"):
        plain.train()
