"""What reading a context takes: against torch's allocations here, and against what an H100 measured."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig

import gistkern
from gistkern.cli import doctor
from gistkern.cli.main import main
from gistkern.memory import OPTIMIZERS, Plan, needs, parts_of, reading_bytes

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def peak_of(call):
    """Highest growth of torch's allocations in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [700, 1501])
def test_reading_beside_torchs_own_allocations(tokens, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    context = torch.randint(1, 512, (1, tokens))
    plain, cache = peak_of(lambda: fill(model, context))
    parts, element = parts_of(config), dtype.itemsize
    calculated = reading_bytes(parts, tokens, element)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == needs(config, Plan(tokens)).full_cache * element // 2
    handle = gistkern.patch_llama(model)
    compressed, cache = peak_of(lambda: gistkern.compress(model, context))
    assert cache.nbytes == needs(config, Plan(tokens, gists=len(handle.gist_token_ids))).gist_cache * element // 2
    ratios = (calculated + held) / plain, calculated / compressed
    print(f"calculated / measured: prefill {ratios[0]:.3f}, compress {ratios[1]:.3f}")
    assert all(0.85 < ratio < 1.2 for ratio in ratios)


@torch.no_grad()
def fill(model, context):
    cache = DynamicCache(config=model.config)
    model.model(context, past_key_values=cache)
    return cache


def test_the_peaks_that_an_h100_measured():
    """docs/results.md, memory on an H100, above the weights; its calls were of one segment of 512."""
    whole = needs(LLAMA_3_8B, Plan(16384))
    assert whole.parameters == 8_030_261_248
    assert (whole.compress_peak - whole.weights) / 1_958_391_808 == pytest.approx(1, abs=0.01)
    assert (whole.prefill_peak - whole.weights) / 4_102_160_384 == pytest.approx(1, abs=0.01)
    segments = needs(LLAMA_3_8B, Plan(16384, gists=8, segment_length=512)).gist_cache
    assert (segments + reading_bytes(parts_of(LLAMA_3_8B), 520)) / 104_421_376 == pytest.approx(0.91, abs=0.01)


FAMILIES = ("mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "olmo2", "granite", "smollm3")
FAMILIES += ("gemma", "gemma2", "gemma3_text", "starcoder2", "cohere", "glm4", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calculated_from_its_configuration(family):
    config = AutoConfig.for_model(family, **SHAPE)
    found = needs(config, Plan(50_000, segment_length=500), training=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.weights == 2 * found.parameters
    head_dim = getattr(config, "head_dim", None) or 32
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * 3
    kept = sum(min(50_000, window) if kind == "sliding_attention" else 50_000 for kind in kinds)
    assert found.full_cache == 2 * kept * config.num_key_value_heads * head_dim * 2
    assert found.weights < found.compress_peak < found.prefill_peak
    quarter = needs(config, Plan(50_000, four_bit=True)).weights
    linears = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert quarter == pytest.approx(found.weights - linears * (2 - 0.5 - 4 / 64), rel=0.01)
    assert found.training.trainable_parameters > 0


@pytest.mark.parametrize("family", ["deepseek_v3", "mamba"])
def test_models_without_such_layers_are_refused(family):
    with pytest.raises(ValueError, match=r"latent rows|no attention layers"):
        parts_of(AutoConfig.for_model(family))


def test_the_command(tmp_path, capsys):
    LLAMA_3_8B.save_pretrained(tmp_path)
    main(["doctor", "--model", str(tmp_path), "--tokens", "6000", "--train", "--4bit", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["peaks"]["training step"] == found["training"]["weights"] + sum(
        found["training"][name] for name in ("trainable", "gradients", "optimizer", "activations")
    ) + max(found["training"]["logits"], found["training"]["working"])
    assert found["fits"]["24 GB"] == dict.fromkeys(found["peaks"], True)
    main(["doctor", "--model", str(tmp_path), "--tokens", "6000", "--train", "--lora", "0"])
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "full cache of 6,000 tokens 0.786 GB" in lines
    assert "gist cache, 11 rows (545x less) 1.4 MB" in lines
    at = lines.index("plain prefill compress training step")
    assert lines[at + 2] == "24 GB yes yes no"
    assert max(map(len, printed.splitlines()[1:])) <= 100
    assert "calculated: 8,030,261,248 parameters" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "5"], "--model and --tokens go together"),
        (["--model", "nowhere/at-all", "--tokens", "5"], "nowhere/at-all"),
        (["--model", "x", "--tokens", "5", "--train", "--4bit", "--lora", "0"], "4-bit weights cannot be trained"),
    ],
)
def test_what_the_command_refuses(options, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", *options])
    assert message in capsys.readouterr().err


def test_the_command_knows_the_optimizers():
    assert set(doctor._OPTIMIZERS) == set(OPTIMIZERS)
