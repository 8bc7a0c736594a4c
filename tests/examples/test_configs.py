"""The 8B presets: read strictly, counted on the meta device, and stepped at tiny size through the same code."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import entries, tiny_llama
from launching import launch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import eval_niah
import gistkern
import train_niah
from gistkern.training import Share
from passkey.data import PasskeyData
from passkey.models import adapted, fast_tokenizer
from passkey.niah import dataset
from passkey.readers import Reader
from passkey.settings import Data, EvaluationRow, made, preset_file, read_evaluation, read_settings
from passkey.trained import open_trained, progress_of
from passkey.training import PasskeyTrainer, dry, train, training_arguments

OURS, THEIRS = preset_file("llama3-8b"), preset_file("llama3-8b-poc")


def on_meta(settings):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings.model.architecture))
    if settings.model.resize_vocabulary:
        rows = model.config.vocab_size + settings.gists["num_gist_tokens"]
        model.resize_token_embeddings(rows, mean_resizing=False)
    gistkern.patch_llama(model, **settings.gists)
    trained = adapted(settings, model).named_parameters()
    return {name: parameter.numel() for name, parameter in trained if parameter.requires_grad}


def test_the_recommended_preset_trains_13672448_parameters():
    counts = on_meta(read_settings(OURS))
    assert sum(counts.values()) == 13_672_448
    assert {name.split(".")[-2] if "lora" not in name else "lora" for name in counts} == {"default", "lora"}
    assert sum(size for name, size in counts.items() if "gist_embeddings" in name) == 10 * 4096


def test_the_proof_of_concept_trains_1064386560_parameters_and_our_gist_rows():
    counts = on_meta(read_settings(THEIRS))
    rows = sum(size for name, size in counts.items() if "gist_embeddings" in name)
    assert rows == 10 * 4096
    assert sum(counts.values()) - rows == 1_064_386_560


def test_the_proof_of_concept_is_as_it_was(tmp_path):
    settings = read_settings(THEIRS)
    assert settings.model.name == "meta-llama/Meta-Llama-3-8B-Instruct"
    quantization = made(BitsAndBytesConfig, settings.quantization, "quantization")
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert quantization.bnb_4bit_compute_dtype == torch.bfloat16
    lora = made(LoraConfig, settings.lora, "lora")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.05)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert lora.modules_to_save == ["embed_tokens", "lm_head", "gist_embeddings"]
    assert settings.gists["num_gist_tokens"] == 10
    assert settings.curriculum.made().max_steps == 500
    assert [stage.batch_size for stage in settings.curriculum.stages] == [8]
    arguments = training_arguments(settings, tmp_path, 500)
    assert arguments.gradient_accumulation_steps == 8, "one sample a micro-batch"
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.max_steps) == (1e-4, 50, 500)
    assert (arguments.optim, arguments.bf16, arguments.save_steps) == ("paged_adamw_8bit", True, 100)
    assert arguments.gradient_checkpointing
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_what_we_recommend_instead():
    ours, theirs = read_settings(OURS), read_settings(THEIRS)
    assert (ours.model.architecture, ours.quantization) == (theirs.model.architecture, theirs.quantization)
    assert (theirs.gists["sink_tokens"], ours.gists["sink_tokens"]) == (0, 1)
    assert (theirs.objectives.distillation, ours.objectives.distillation) == (0, 1)
    assert len(ours.curriculum.stages) > len(theirs.curriculum.stages) == 1
    assert not ours.model.resize_vocabulary


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  warmup_steps: 50", "  warmup: 50", "unknown key training.warmup: did you mean training.warmup_steps?"),
        ("lora:", "Lora:", "bad.yaml: Lora: unknown key"),
        ("bnb_4bit_quant_type", "bnb_4bit_type", "unknown key quantization.bnb_4bit_type: did you mean .*quant_type"),
        ("sink_tokens: 1", "sinks: 1", "unknown key gists.sinks: did you mean gists.sink_tokens"),
        ("tokens: [128, 256]", "token: [1, 2]", r"curriculum.stages\[0\].token: unknown key"),
        ("gists:\n", "gist:\n", "gists: Field required; gist: unknown key"),
        ("_tokens: 10\n", "_tokens: '10'\n", "gists: num_gist_tokens must be an int >= 1, got '10'"),
        ("    - {steps: 100, ", "    - {", r"curriculum.stages\[0\].steps: Field required"),
        ("{steps: 100, ", "{steps: '100', ", r"curriculum.stages\[0\].steps: Input should be a valid integer"),
        ("{steps: 100, ", "{steps: true, ", r"curriculum.stages\[0\].steps: Input should be a valid integer"),
        ("  r: 16\n", "  r: 16\n  r: 8\n", r"key 'r' is given twice \(line \d+\)"),
        ("[128, 256]", "[128]", r"curriculum.stages\[0\].tokens\[1\]: Field required"),
        ("[128, 256]", "[256, 128]", r"curriculum.stages\[0\]: tokens must be \(least, most\)"),
        ("4bit: true", "4bit: 'yes'", "quantization: load_in_4bit must be a boolean"),
        ("dtype: bfloat16", "dtype: float8", "model.dtype: Input should be 'bfloat16' or 'float32'"),
        ("  answer: 1.0", "  answer: -1.0", "objectives: the weight of answer must be a number >= 0"),
        ("steps: 300, ", "steps: 300, gate: 0.9, ", "curriculum: the last stage has a gate"),
        (
            "    hidden_size",
            "    hiden_size",
            "unknown key model.architecture.hiden_size: did you mean model.architecture.hidden_size?",
        ),
        ("gists:", "gists: 10\nnothing:", "gists: Input should be an object; nothing: unknown key"),
    ],
)
def test_bad_recipes_are_refused(old, new, message, tmp_path):
    text = OURS.read_text()
    assert old in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        _all_made(path, tmp_path)


def _all_made(path, run):
    """Everything that a file's sections are turned into."""
    settings = read_settings(path)
    made(LoraConfig, settings.lora, "lora")
    made(BitsAndBytesConfig, settings.quantization, "quantization")
    training_arguments(settings, run, 10)
    made(partial(gistkern.patch_llama, tiny_llama(), None), settings.gists, "gists")
    made(LlamaConfig, settings.model.architecture, "model.architecture")


def test_a_file_is_named_with_its_mistake(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(OURS.read_text().replace("lora:", "Lora:"))
    with pytest.raises(ValueError, match=str(path)):
        read_settings(path)
    path.write_text("- a list")
    with pytest.raises(ValueError, match=f"{path}: the file: Input should be an object"):
        read_settings(path)


def test_rates_may_be_written_without_a_point(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(OURS.read_text().replace("2.0e-4", "2e-4"))
    assert read_settings(path).training == read_settings(OURS).training


def test_rows_of_an_evaluation_are_a_list(tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text("- {language: en, tokens: 120, samples: 2}\n- {language: ko, tokens: 90, samples: 1, keys: 1}\n")
    assert read_evaluation(path) == (EvaluationRow("en", 120, 2), EvaluationRow("ko", 90, 1))
    path.write_text("- {language: en, tokens: 120, sample: 2}\n- {language: fr, tokens: 0, samples: 1}\n")
    message = r"\[0\].samples: Field required; \[0\].sample: unknown key; \[1\].language: .*; \[1\].tokens: .* than 0"
    with pytest.raises(ValueError, match=message):
        read_evaluation(path)
    path.write_text("tokens: 120")
    with pytest.raises(ValueError, match="the file: Input should be a valid array"):
        read_evaluation(path)


@pytest.mark.parametrize("name", ["tiny", "tiny-leak", "smollm2", "smollm2-mean", "llama3-8b", "llama3-8b-poc"])
def test_what_a_run_keeps_of_its_settings_reads_back(name, tmp_path):
    settings = read_settings(preset_file(name), seed=3)
    path = tmp_path / "settings.json"
    path.write_text(settings.written())
    assert read_settings(path) == settings
    assert (settings.name, settings.seed) == (name, 3)


def test_an_optional_section_may_be_left_out(tmp_path):
    text = OURS.read_text()
    begin, end = text.index("quantization:"), text.index("gists:")
    path = tmp_path / "plain.yaml"
    path.write_text(text[:begin] + text[end:])
    assert read_settings(path).quantization is None
    assert read_settings(OURS).quantization is not None


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory):
    runs = {path: tmp_path_factory.mktemp(path.stem) / "run" for path in (OURS, THEIRS)}
    for path, run in runs.items():
        train(dry(read_settings(path), run), run)
    return runs


def log_of(run):
    """Of the steps, without their times."""
    return [
        {name: value for name, value in entry.items() if "per_second" not in name and name != "train_runtime"}
        for entry in entries(run)
    ]


@pytest.mark.parametrize("path", [OURS, THEIRS], ids=lambda path: path.stem)
def test_dry_run(path, dry_runs):
    run, settings = dry_runs[path], read_settings(dry_runs[path] / "settings.json")
    log = log_of(run)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(0 < entry["grad_norm"] < 1e3 for entry in log)
    assert ("distillation" in log[0]) == (path is OURS)
    assert [entry["stage"] for entry in log][-1] == len(settings.curriculum.stages) - 1, "every stage is stepped"
    assert sorted(folder.name for folder in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    trained_model = open_trained(run)
    model, handle = trained_model.model, trained_model.handle
    tensors = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("settings"))
    size = (run / "checkpoint-4" / "adapter_model.safetensors").stat().st_size
    lora = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32))
    whole = 2 * (1024 + 10) * 64 if path is THEIRS else 0
    assert trained == lora + 10 * 64 + whole
    assert 4 * trained < size < 4 * trained + 8_000, "each matrix once"
    assert len(handle.gist_token_ids) == 10
    assert handle.gist_token_ids[0] == 1024, "in the tokenizer's order, behind its own tokens"
    assert model.config.vocab_size == 1024 + (10 if path is THEIRS else 0)


def test_evaluation_follows_training(tmp_path):
    run = tmp_path / "run"
    train_niah.main(["--preset", "llama3-8b", "--dry-run", "--run", str(run)])
    report = json.loads((run / "report.json").read_text())
    assert (report["preset"], report["checkpoint"]) == ("llama3-8b", "checkpoint-4")
    assert report["training"]["steps"] == 4
    assert [(row["language"], row["wordings"], row["n"]) for row in report["rows"]] == [
        ("en", "training", 3),
        ("ko", "training", 3),
        ("en", "held_out", 3),
        ("ko", "held_out", 3),
    ]
    assert {row["gist_tokens"] for row in report["rows"]} == {11}, "ten gists and a sink"
    assert report["swap"]["n"] == 20


def test_any_checkpoint_of_a_run_can_be_evaluated(dry_runs, tmp_path):
    run, path = dry_runs[OURS], tmp_path / "rows.yaml"
    path.write_text("- {language: en, tokens: 120, samples: 2}")
    ask = ["--rows", str(path), "--output", str(tmp_path / "out"), "--checkpoint"]
    eval_niah.main([*ask, str(run / "checkpoint-2"), "--full", "2"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["checkpoint"], report["training"]["steps"]) == ("checkpoint-2", 2)
    (full,) = report["full_context"]
    assert (full["gist_tokens"], full["n"]) == (120, 2)
    eval_niah.main([*ask, str(run), "--overwrite"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["checkpoint"] == "checkpoint-4", "the newest"
    alone = shutil.copytree(run / "checkpoint-4", tmp_path / "alone" / "adapter")
    with pytest.raises(ValueError, match="belongs to no run"):
        open_trained(alone)


def test_what_the_tokenizer_puts_in_front_is_read_first(dry_runs):
    """As in training; the context's length does not count it."""
    opened = open_trained(dry_runs[OURS])
    backend = opened.tokenizer.backend_tokenizer
    (sample,) = dataset(backend, "en", 120, 1)
    start = backend.encode(" Monday").ids
    plain, begun = opened.reader(), Reader(opened.model, backend, opened.compression, start=start)
    cache = begun.compress([sample])
    assert cache.get_seq_length() == len(start) + plain.compress([sample]).get_seq_length()
    said = plain.compress([replace(sample, context=" Monday" + sample.context)])
    assert all(torch.equal(a.gist.key, b.gist.key) for a, b in zip(cache.layers, said.layers, strict=True))
    assert plain.digest != begun.digest


def test_an_interrupted_run_resumes_to_the_same_adapter(dry_runs, tmp_path):
    whole, part = dry_runs[THEIRS], tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-4")
    # its dry model lies where the whole run is
    train(read_settings(whole / "settings.json"), part, resume=True)
    first, second = (load_file(run / "checkpoint-4" / "adapter_model.safetensors") for run in (whole, part))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = load_file(whole / "checkpoint-2" / "adapter_model.safetensors")
    assert not all(torch.equal(first[name], start[name]) for name in first), "it did train on"
    assert log_of(part) == [{**entry} for entry in log_of(whole)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_write_and_evaluate_once_and_one_goes_on(tmp_path):
    """train_niah.py under torchrun: one log, one report, and one process goes on with the same batches."""
    script, run = OURS.parents[1] / "train_niah.py", tmp_path / "run"
    launch(script, 2, "--preset", OURS.stem, "--dry-run", "--run", run)
    assert [entry["step"] for entry in log_of(run)] == [1, 2, 3, 4]
    assert progress_of(run / "checkpoint-4")["finished"]
    assert len((run / "answers.jsonl").read_text().splitlines()) == 3 * len(read_settings(OURS).evaluation)
    shutil.rmtree(run / "checkpoint-4")
    before = log_of(run)
    settings = read_settings(run / "settings.json")
    assert train(settings, run, resume=True) == run / "checkpoint-4"
    assert log_of(run)[:2] == before[:2]
    assert [entry["step"] for entry in log_of(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("path", [OURS, THEIRS], ids=lambda path: path.stem)
def test_the_loss_falls_on_a_fixed_batch(path, dry_runs, tmp_path):
    """With the recipe's own optimizer, rate, precision and objectives."""
    settings = read_settings(dry_runs[path] / "settings.json")
    settings = replace(settings, training={**settings.training, "gradient_accumulation_steps": 1, "save_steps": 100})
    trainer = PasskeyTrainer(settings, tmp_path)
    data = trainer.train_dataset
    batch = data.draw(0, Share())
    data.draw = lambda step, share: batch
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same dropout before and after
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            losses.append(trainer.objectives(trainer.model.train(), batch).total.item())
        if len(losses) == 1:
            trainer.train()
    assert losses[1] < losses[0]


def test_folders_in_use_and_nothing_to_resume(dry_runs, tmp_path):
    run = dry_runs[OURS]
    settings = read_settings(run / "settings.json")
    with pytest.raises(ValueError, match="is in use"):
        train(settings, run)
    with pytest.raises(ValueError, match="nothing to resume"):
        train(settings, tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="is a run of other settings"):
        train(dry(read_settings(THEIRS), run), run, resume=True)
    assert not (tmp_path / "none").exists()


def data_of(run, **changes):
    settings = replace(read_settings(run / "settings.json"), **changes)
    model, tokenizer = tiny_llama(), fast_tokenizer()
    handle = gistkern.patch_llama(model, tokenizer, **settings.gists)
    return PasskeyData(settings, settings.curriculum.made(), handle, tokenizer)


def test_batches_follow_from_step_and_stage(dry_runs):
    data = data_of(dry_runs[OURS], data=Data(languages=("en",)), curriculum=read_settings(OURS).curriculum)
    first, again, other = (data.draw(step, Share()) for step in (3, 3, 4))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not (first["input_ids"].shape == other["input_ids"].shape and first["input_ids"].equal(other["input_ids"]))
    assert len(first["input_ids"]) == data.size == 8
    contexts = (first["teacher"]["input_ids"].shape[1], other["teacher"]["input_ids"].shape[1])
    assert all(128 < tokens < 300 for tokens in contexts)
    for row, labels in zip(first["input_ids"], first["labels"], strict=True):
        answer = data.collator.tokenizer.decode(row[labels != -100])
        assert len(answer) == 5
        assert data.collator.tokenizer.decode(row).count(answer) >= 2, "in the context, and after the question"
    while data.curriculum.index < 3:
        data.curriculum.update(1.0)
    assert max(data.draw(step, Share(0, 8))["input_ids"].shape[1] for step in range(8)) > 2990


def test_a_tokenizer_that_starts_texts_with_a_token_starts_contexts_with_it(dry_runs):
    from tokenizers.processors import TemplateProcessing

    settings = read_settings(dry_runs[THEIRS] / "settings.json")
    tokenizer = fast_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    handle = gistkern.patch_llama(tiny_llama(), tokenizer, **settings.gists)
    data = PasskeyData(settings, settings.curriculum.made(), handle, tokenizer)
    tokenizer.backend_tokenizer.post_processor = None  # shared by all that train_tokenizer made
    batch = data.draw(0, Share())
    assert (batch["input_ids"] == 0).sum(1).tolist() == [1, 1]
    assert batch["input_ids"][:, 0].tolist() == [0, 0]
