"""The memory calculator against what torch, peft and bitsandbytes really allocate, at small scale on CPU."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gistkern
from bench.calculated.training_memory import config_of, main, setup_of
from gistkern.memory import Precision, TrainingSetup, estimate, parts_of
from gistkern.memory.terms import Saved
from gistkern.training import GistDataCollator, Objectives

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
TOKENS, TAIL = 200, 12


def lora(dropout=0.05, whole=(), targets=("q_proj", "k_proj", "v_proj", "o_proj")):
    return LoraConfig(
        r=16, lora_dropout=dropout, target_modules=list(targets), modules_to_save=[*whole, "gist_embeddings"]
    )


def plain(**changes):
    given = {"weights": "float32", "autocast": False, "optimizer": "adamw_torch", "logit_rows": TAIL - 1, **changes}
    return TrainingSetup(tokens=TOKENS, on_cpu=True, **given)


def build(setup, folder, layers=3):
    """The model that a setup describes: (model, handle)."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.num_hidden_layers = layers
    model = LlamaForCausalLM(config)
    if setup.weights == "nf4":
        model.save_pretrained(folder)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=setup.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    elif setup.weights == "bfloat16":
        model = model.bfloat16()
    handle = gistkern.patch_llama(model)
    wrapped = model if setup.lora is None else get_peft_model(model, copy.deepcopy(setup.lora))
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return wrapped.train(), handle


def forward(model, handle, setup):
    gists = handle.gist_token_ids
    context = torch.randint(1, 2048, (1, TOKENS - TAIL - len(gists)))
    ids = torch.cat([context, torch.tensor([gists]), torch.randint(1, 2048, (1, TAIL))], 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast):
        if setup.teacher:
            sample = {"context_ids": context[0], "question_ids": ids[0, -TAIL:][:1], "answer_ids": ids[0, 1 - TAIL :]}
            batch = GistDataCollator(0, handle, teacher=True)([sample])
            return Objectives(answer=1.0, distillation=1.0)(model, batch).total
        if setup.logit_rows is None:
            return model(ids, labels=ids).loss
        logits = model(ids, logits_to_keep=TAIL, use_cache=False).logits[0, :-1]
        return F.cross_entropy(logits.float(), ids[0, 1 - TAIL :])


def saved_bytes(model, handle, setup):
    """What autograd keeps of a forward pass, parameters aside."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, handle, setup)
    return sum(size for size, _ in kept.values())


def peak_bytes(model, handle, setup):
    """Highest growth of torch's allocations within a step; gradients are there already, as when accumulating."""
    forward(model, handle, setup).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward(model, handle, setup).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert abs(live) < 1_000, "a step leaves nothing behind"
    return peak


def size_of(tensors):
    return sum(size for _, size in {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors})


WHOLE = ("embed_tokens", "lm_head")
SETUPS = {
    "lora": plain(lora=lora(), gradient_checkpointing=False),
    "lora-no-dropout": plain(lora=lora(0.0), gradient_checkpointing=False),
    "lora-on-the-mlp": plain(lora=lora(targets=("q_proj", "gate_proj", "up_proj", "down_proj"))),
    "lora-checkpointed": plain(lora=lora()),
    "lora-distilled": plain(lora=lora(), teacher=True),
    "lora-all-logits": plain(lora=lora(), logit_rows=None),
    "lora-whole-matrices": plain(lora=lora(whole=WHOLE), logit_rows=None, gradient_checkpointing=False),
    "lora-bf16-autocast": plain(lora=lora(), autocast=True, gradient_checkpointing=False),
    "bf16-autocast": plain(lora=lora(), autocast=True, weights="bfloat16"),
    "full": plain(gradient_checkpointing=False),
    "full-checkpointed-all-logits": plain(logit_rows=None),
    "full-autocast": plain(autocast=True, gradient_checkpointing=False),
    "nf4": plain(lora=lora(), weights="nf4", autocast=True, gradient_checkpointing=False),
    "nf4-checkpointed": plain(lora=lora(), weights="nf4", autocast=True),
    "nf4-checkpointed-whole-matrices": plain(lora=lora(whole=WHOLE), weights="nf4", autocast=True, logit_rows=None),
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_peak_of_a_step(setup, tmp_path):
    model, handle = build(setup, tmp_path)
    found = estimate(parts_of(CONFIG), setup)
    ratio = (found.activations + max(found.logits, found.working)) / peak_bytes(model, handle, setup)
    print(f"estimate / measured peak: {ratio:.3f}")
    assert 0.92 < ratio < 1.15
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    scales = [
        tensor
        for state in (parameter.quant_state for parameter in frozen if hasattr(parameter, "quant_state"))
        for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert found.weights == size_of([*frozen, *scales])
    assert found.trainable == size_of(trained)
    assert found.trainable_parameters == sum(parameter.numel() for parameter in trained)
    assert found.gradients == size_of([parameter.grad for parameter in trained if parameter.grad is not None])


@pytest.mark.parametrize(
    "name", ["lora", "lora-no-dropout", "lora-on-the-mlp", "lora-bf16-autocast", "bf16-autocast", "full", "nf4"]
)
def test_what_a_layer_keeps(name, tmp_path):
    setup = replace(SETUPS[name], gradient_checkpointing=False)
    kept = [saved_bytes(*build(setup, tmp_path, layers), setup) for layers in (1, 2)]
    saved = Saved(parts_of(CONFIG), Precision(setup.weights, setup.autocast), setup.lora, TOKENS, 11, 4)
    assert saved.layer == pytest.approx(kept[1] - kept[0], rel=0.01)


def test_a_wrong_setup_is_out_of_the_band(tmp_path):
    """The checks above can fail: each mistaken setting moves the estimate far out of their band."""
    setup = SETUPS["lora"]
    peak = peak_bytes(*build(setup, tmp_path), setup)
    for wrong in (
        replace(setup, gradient_checkpointing=True),
        replace(setup, logit_rows=None),
        replace(setup, lora=lora(0.0)),
        replace(setup, autocast=True),
    ):
        found = estimate(parts_of(CONFIG), wrong)
        assert not 0.9 < (found.activations + max(found.logits, found.working)) / peak < 1.18, wrong


def test_single_quantization_takes_more(tmp_path):
    setup = replace(SETUPS["nf4"], double_quant=False)
    model, _ = build(setup, tmp_path)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    states = [parameter.quant_state for parameter in frozen if hasattr(parameter, "quant_state")]
    assert states[0].state2 is None
    assert estimate(parts_of(CONFIG), setup).weights == size_of(
        [*frozen, *(tensor for state in states for tensor in (state.absmax, state.code))]
    )


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit"])
def test_optimizer_state(optimizer, tmp_path):
    setup = plain(lora=lora(whole=WHOLE), optimizer=optimizer)
    model, handle = build(setup, tmp_path)
    arguments = TrainingArguments(str(tmp_path), optim=optimizer, use_cpu=True, report_to="none")
    adamw = Trainer(model, arguments).create_optimizer()
    forward(model, handle, setup).backward()
    adamw.step()
    names = {"exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2"}
    states = [tensor for state in adamw.state.values() for name, tensor in state.items() if name in names]
    found = estimate(parts_of(CONFIG), setup)
    assert found.optimizer == size_of(states)
    large = [tensor for tensor in states if tensor.numel() >= 100_000]
    assert found.paged == (size_of(large) if "paged" in optimizer else 0)


def test_cache_bytes():
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).bfloat16().eval()
    gistkern.patch_llama(model)
    context = torch.randint(1, 2048, (1, 200))
    found = estimate(parts_of(CONFIG), replace(plain(lora=lora()), tokens=200))
    assert gistkern.compress(model, context).nbytes == found.kv_gist
    model.gistkern_handle.unpatch()
    cache = DynamicCache()
    with torch.no_grad():
        model(context, past_key_values=cache)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == found.kv_full


def test_batch_rows_count(tmp_path):
    one, two = (estimate(parts_of(CONFIG), plain(lora=lora(), batch_size=size)) for size in (1, 2))
    assert two.activations == 2 * one.activations
    assert two.kv_gist == one.kv_gist, "of one context"


def test_8b_presets_by_hand():
    """Calculated, never run: the large terms once more, by hand."""
    found = {}
    for name in ("llama3-8b", "llama3-8b-poc"):
        recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        found[name] = estimate(parts_of(config_of(recipe)), setup_of(recipe))
    ours, theirs = found["llama3-8b"], found["llama3-8b-poc"]
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    vocabulary = 2 * 128256 * 4096 * 4
    assert ours.weights == pytest.approx(linears * (0.5 + 1 / 64 + 4 / (64 * 256)) + vocabulary, rel=1e-3)
    assert ours.gradients == 4 * 13_672_448
    assert theirs.gradients == 4 * (1_064_386_560 + 10 * 4096)
    embedding = 128266 * 4096
    assert theirs.optimizer == pytest.approx(embedding * 8 + embedding * 2 * (1 + 4 / 256), rel=0.01)
    assert ours.activations == 32 * (6096 + 10 + 32) * 4096 * 4
    assert ours.kv_gist == 11 * 32 * 2 * 1024 * 2
    assert ours.total < theirs.total


def test_command_line(capsys):
    path = CONFIGS / "llama3-8b-poc.yaml"
    main(["--config", str(path)])
    assert "only while optimizer states (5.3 GB) are paged" in capsys.readouterr().out
    main(["--config", str(path), "--card", "80"])
    out = capsys.readouterr().out
    assert "It fits a card of 80 GB" in out
    assert "1,064,427,520 trained parameters" in out
    main(["--config", str(path), "--all-logits"])
    assert "It does not fit a card of 24 GB, even" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--config", "nowhere.yaml"])


@pytest.mark.parametrize("options", [["llama3-8b"], ["llama3-8b-poc"], ["llama3-8b-poc", "--all-logits"]])
def test_the_page_shows_what_the_command_prints(options, capsys):
    name, *rest = options
    main(["--config", str(CONFIGS / f"{name}.yaml"), *rest])
    page = (ROOT / "docs" / "internals" / "training-memory.md").read_text().splitlines()
    missing = [line for line in capsys.readouterr().out.splitlines() if line not in page]
    assert not missing, "make the tables of docs/internals/training-memory.md again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "int3"}, "unknown weights 'int3': expected one of float32, bfloat16, nf4"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"weights": "nf4"}, "4-bit weights cannot be trained: pass lora"),
    ],
)
def test_bad_setups(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSetup(tokens=10, **changes)


def test_a_recipe_without_what_memory_depends_on_is_refused():
    recipe = yaml.safe_load((CONFIGS / "llama3-8b.yaml").read_text())
    del recipe["training"]["optim"]
    with pytest.raises(ValueError, match="the recipe lacks 'optim'"):
        setup_of(recipe)


def test_unknown_modules_are_refused():
    with pytest.raises(ValueError, match="cannot calculate with the trained modules router"):
        estimate(parts_of(CONFIG), plain(lora=lora(targets=["router"])))
