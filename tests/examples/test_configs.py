"""The 8B presets: read strictly, counted on the meta device, and stepped at tiny size through the same code."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from launching import launch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import eval_niah
import gistkern
import niah
import train_niah
from gistkern.training.recipe import read_recipe
from llama3 import DRY_STEPS, PasskeyDataset, load_trained, make_trainer, open_trained, tiny, train_from_config
from passkey.niah import dataset
from presets import RECIPES

OURS, THEIRS = RECIPES["llama3-8b"], RECIPES["llama3-8b-poc"]


def on_meta(recipe):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**recipe.model.architecture))
    if recipe.model.resize_vocabulary:
        model.resize_token_embeddings(model.config.vocab_size + recipe.gists.num_gist_tokens, mean_resizing=False)
    gistkern.patch_llama(model, num_gist_tokens=recipe.gists.num_gist_tokens)
    trained = get_peft_model(model, recipe.lora.config()).named_parameters()
    return {name: parameter.numel() for name, parameter in trained if parameter.requires_grad}


def test_the_recommended_preset_trains_13672448_parameters():
    counts = on_meta(read_recipe(OURS))
    assert sum(counts.values()) == 13_672_448
    assert {name.split(".")[-2] if "lora" not in name else "lora" for name in counts} == {"default", "lora"}
    assert sum(size for name, size in counts.items() if "gist_embeddings" in name) == 10 * 4096


def test_the_proof_of_concept_trains_1064386560_parameters_and_our_gist_rows():
    counts = on_meta(read_recipe(THEIRS))
    rows = sum(size for name, size in counts.items() if "gist_embeddings" in name)
    assert rows == 10 * 4096
    assert sum(counts.values()) - rows == 1_064_386_560


def test_the_proof_of_concept_is_as_it_was(tmp_path):
    recipe = read_recipe(THEIRS)
    assert recipe.model.name == "meta-llama/Meta-Llama-3-8B-Instruct"
    quantization = recipe.quantization.config()
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert quantization.bnb_4bit_compute_dtype == torch.bfloat16
    lora = recipe.lora.config()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.05)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert lora.modules_to_save == ["embed_tokens", "lm_head", "gist_embeddings"]
    assert recipe.gists.num_gist_tokens == 10
    assert recipe.curriculum.curriculum().max_steps == 500
    arguments = recipe.training.arguments(tmp_path, 500, use_cpu=True)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (1, 8)
    assert (arguments.learning_rate, arguments.warmup_steps, arguments.max_steps) == (1e-4, 50, 500)
    assert (arguments.optim, arguments.bf16, arguments.save_steps) == ("paged_adamw_8bit", True, 100)
    assert arguments.gradient_checkpointing
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_what_we_recommend_instead():
    ours, theirs = read_recipe(OURS), read_recipe(THEIRS)
    assert (ours.model.architecture, ours.quantization) == (theirs.model.architecture, theirs.quantization)
    assert (theirs.gists.sink_tokens, ours.gists.sink_tokens) == (0, 1)
    assert (theirs.objectives.distillation, ours.objectives.distillation) == (0, 1)
    assert len(ours.curriculum.stages) > len(theirs.curriculum.stages) == 1
    assert not ours.model.resize_vocabulary


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  warmup_steps: 50", "  warmup: 50", "unknown key training.warmup: did you mean training.warmup_steps?"),
        ("lora:", "Lora:", "unknown key Lora: did you mean lora?"),
        ("tokens: [128, 256]", "token: [1, 2]", r"unknown key curriculum.stages\[0\].token: did you mean .*tokens\?"),
        ("  r: 16\n", "", "missing lora.r"),
        ("  r: 16\n", "  r: 16\n  r: 8\n", r"key 'r' is given twice \(line \d+\)"),
        ("  r: 16\n", "  r: '16'\n", "lora.r must be of type int, got '16'"),
        ("  r: 16\n", "  r: true\n", "lora.r must be of type int, got True"),
        ("2.0e-4", "2e-4", "learning_rate must be of type float, got '2e-4' .*write 1.0e-4"),
        ("bf16: true", "bf16: 1", "training.bf16 must be of type bool, got 1"),
        ("[128, 256]", "[128]", r"curriculum.stages\[0\].tokens must be a list of 2 values"),
        ("[128, 256]", "[256, 128]", r"curriculum.stages\[0\]: tokens must be \(least, most\)"),
        ("type: nf4", "type: fp4", "quantization.bnb_4bit_quant_type must be one of 'nf4', got 'fp4'"),
        ("4bit: true", "4bit: 1", "quantization.load_in_4bit must be one of True, got 1"),
        ("[q_proj, k_proj, v_proj, o_proj]", "q_proj", "lora.target_modules must be a list, got 'q_proj'"),
        ("[q_proj,", "[3,", r"lora.target_modules\[0\] must be of type str, got 3"),
        ("  answer: 1.0", "  answer: -1.0", "objectives: the weight of answer must be a number >= 0"),
        ("steps: 100, ", "steps: 100, batch_size: 4, ", "set training.per_device_train_batch_size instead"),
        ("steps: 300, ", "steps: 300, gate: 0.9, ", "curriculum: the last stage has a gate"),
        (
            "    hidden_size",
            "    hiden_size",
            "model: unknown key architecture.hiden_size: did you mean .*.hidden_size?",
        ),
        ("gists:", "gists: 10\nnothing:", "unknown key nothing"),
    ],
)
def test_bad_recipes_are_refused(old, new, message, tmp_path):
    text = OURS.read_text()
    assert old in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(path)
    assert str(path) in str(error.value), "the file is named"


def test_an_optional_section_may_be_left_out(tmp_path):
    text = OURS.read_text()
    begin, end = text.index("quantization:"), text.index("gists:")
    path = tmp_path / "plain.yaml"
    path.write_text(text[:begin] + text[end:])
    assert read_recipe(path).quantization is None
    assert read_recipe(OURS).quantization is not None


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory):
    runs = {path: tmp_path_factory.mktemp(path.stem) / "run" for path in (OURS, THEIRS)}
    for path, run in runs.items():
        train_from_config(path, run, dry_run=True)
    return runs


def log_of(run):
    return [entry for line in (run / "log.jsonl").read_text().splitlines() if "loss" in (entry := json.loads(line))]


@pytest.mark.parametrize("path", [OURS, THEIRS], ids=lambda path: path.stem)
def test_dry_run(path, dry_runs):
    run, recipe = dry_runs[path], tiny(read_recipe(path))
    log = log_of(run)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(0 < entry["grad_norm"] < 1e3 for entry in log)
    assert ("distillation" in log[0]) == (path is OURS)
    assert [entry["stage"] for entry in log][-1] == len(recipe.curriculum.stages) - 1, "every stage is stepped"
    assert sorted(folder.name for folder in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    model, handle = load_trained(recipe, run / "adapter", str(run / "tiny-model"))
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("settings"))
    size = (run / "adapter" / "adapter_model.safetensors").stat().st_size
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
    assert (report["preset"], report["checkpoint"], report["training"]) == ("run", "adapter", {"steps": 4})
    assert [(row["language"], row["wordings"], row["n"]) for row in report["rows"]] == [
        ("en", "training", 3),
        ("ko", "training", 3),
        ("en", "held_out", 3),
        ("ko", "held_out", 3),
    ]
    assert {row["gist_tokens"] for row in report["rows"]} == {11}, "ten gists and a sink"
    assert report["swap"]["n"] == 20
    assert "Trained: 4 steps." in (run / "report.md").read_text()


def test_any_checkpoint_of_a_run_can_be_evaluated(dry_runs, tmp_path, capsys):
    run, path = dry_runs[OURS], tmp_path / "samples.jsonl"
    niah.main(["--tokens", "120", "--samples", "2", "--out", str(path)])
    ask = ["--dataset", str(path), "--output", str(tmp_path / "out"), "--checkpoint"]
    eval_niah.main([*ask, str(run / "checkpoint-2"), "--full"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["checkpoint"], report["training"]) == ("checkpoint-2", {"steps": 2})
    (full,) = report["full_context"]
    assert (full["gist_tokens"], full["n"]) == (120, 2)
    eval_niah.main([*ask, str(run), "--overwrite"])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["checkpoint"] == "checkpoint-4", "the newest"
    with pytest.raises(SystemExit):
        eval_niah.main([*ask, str(run), "--overwrite", "--measure"])
    assert "--measure loads presets only" in capsys.readouterr().err
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    with pytest.raises(ValueError, match="belongs to no run of a recipe"):
        open_trained(alone)


def test_what_the_tokenizer_puts_in_front_is_read_first(dry_runs):
    """As in training; the context's length does not count it."""
    opened = open_trained(dry_runs[OURS] / "adapter")
    (sample,) = dataset(opened.tokenizer, "en", 120, 1)
    start = opened.tokenizer.encode(" Monday").ids
    plain, begun = opened.reader(), replace(opened, start=start).reader()
    cache = begun.compress([sample])
    assert cache.get_seq_length() == len(start) + plain.compress([sample]).get_seq_length()
    said = plain.compress([replace(sample, context=" Monday" + sample.context)])
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, said.layers, strict=True))
    assert plain.digest != begun.digest


def test_an_interrupted_run_resumes_to_the_same_adapter(dry_runs, tmp_path):
    whole, part = dry_runs[THEIRS], tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-4")
    shutil.rmtree(part / "adapter")
    train_from_config(THEIRS, part, dry_run=True, resume=True)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, part))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = load_file(whole / "checkpoint-2" / "adapter_model.safetensors")
    assert not all(torch.equal(first[name], start[name]) for name in first), "it did train on"
    assert log_of(part) == [{**entry} for entry in log_of(whole)]


@pytest.mark.timeout(600)
def test_two_processes_write_and_evaluate_once_and_one_goes_on(tmp_path):
    """train_niah.py under torchrun: the global batch is twice as large, no sample comes twice, one log, one report."""
    script, run = OURS.parents[1] / "train_niah.py", tmp_path / "run"
    launch(script, 2, "--preset", OURS.stem, "--dry-run", "--run", run)
    assert [entry["step"] for entry in log_of(run)] == list(range(1, DRY_STEPS + 1))
    state = json.loads((run / f"checkpoint-{DRY_STEPS}" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.0
    assert len((run / "answers.jsonl").read_text().splitlines()) == 3 * len(read_recipe(OURS).evaluation.rows)
    shutil.rmtree(run / f"checkpoint-{DRY_STEPS}")
    shutil.rmtree(run / "adapter")
    before = log_of(run)
    assert train_from_config(OURS, run, dry_run=True, resume=True) == run / "adapter"
    assert log_of(run)[: DRY_STEPS // 2] == before[: DRY_STEPS // 2]
    assert [entry["step"] for entry in log_of(run)] == list(range(1, DRY_STEPS + 1))


@pytest.mark.parametrize("path", [OURS, THEIRS], ids=lambda path: path.stem)
def test_the_loss_falls_on_a_fixed_batch(path, dry_runs, tmp_path, capsys):
    """With the recipe's own optimizer, rate, precision and objectives."""
    source, recipe = str(dry_runs[path] / "tiny-model"), tiny(read_recipe(path))
    recipe = replace(recipe, training=replace(recipe.training, gradient_accumulation_steps=1, save_steps=100))
    trainer = make_trainer(recipe, source, source, tmp_path)
    paging = "NOTE: no GPU. paged_adamw_8bit runs, but bitsandbytes pages nothing on a CPU"
    assert torch.cuda.is_available() or paging in capsys.readouterr().err
    trainer.train_dataset = Fixed(trainer.train_dataset[0], len(trainer.train_dataset))
    losses = []
    for _ in range(2):
        torch.manual_seed(0)  # the same dropout before and after
        batch = trainer.data_collator([trainer.train_dataset[0]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            losses.append(trainer.objectives(trainer.model.train(), batch).total.item())
        if len(losses) == 1:
            trainer.train()
    assert losses[1] < losses[0]


class Fixed(torch.utils.data.Dataset):
    def __init__(self, sample, count):
        self.sample, self.count = sample, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.sample


def test_folders_in_use_and_nothing_to_resume(dry_runs, tmp_path):
    run = dry_runs[OURS]
    with pytest.raises(ValueError, match="is in use"):
        train_from_config(OURS, run, dry_run=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        train_from_config(OURS, tmp_path / "none", dry_run=True, resume=True)
    with pytest.raises(ValueError, match="is a run of another recipe"):
        train_from_config(THEIRS, run, dry_run=True, resume=True)
    with pytest.raises(ValueError, match="makes its own model"):
        train_from_config(OURS, tmp_path / "none", dry_run=True, model="elsewhere")
    assert not (tmp_path / "none").exists()


def test_samples_follow_from_their_number_and_stage(dry_runs):
    from transformers import AutoTokenizer

    recipe = read_recipe(OURS)
    recipe = replace(recipe, data=replace(recipe.data, languages=("en",), filler="templates"))
    tokenizer = AutoTokenizer.from_pretrained(dry_runs[OURS] / "tiny-model")
    curriculum = recipe.curriculum.curriculum()
    data = PasskeyDataset(recipe, tokenizer, curriculum, 10)
    first, again, other = data[3], data[3], data[4]
    assert first == again != other
    assert 128 <= len(first["context_ids"]) <= 256
    answer = tokenizer.decode(first["answer_ids"])
    assert len(answer) == 5
    assert answer in tokenizer.decode(first["context_ids"])
    while curriculum.index < 3:
        curriculum.update(1.0)
    assert max(len(data[number]["context_ids"]) for number in range(6)) > 2990


def test_a_tokenizer_that_starts_texts_with_a_token_starts_contexts_with_it(dry_runs):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    recipe = tiny(read_recipe(THEIRS))
    tokenizer = AutoTokenizer.from_pretrained(dry_runs[THEIRS] / "tiny-model")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    sample = PasskeyDataset(recipe, tokenizer, recipe.curriculum.curriculum(), 1)[0]
    assert sample["context_ids"][0] == 0
    assert 0 not in sample["question_ids"] + sample["answer_ids"] + sample["context_ids"][1:]
