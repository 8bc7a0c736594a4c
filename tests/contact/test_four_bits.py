"""Models in 4 bits: bitsandbytes may pack their weights anew at the first forward, and they stay the same model."""

import pytest
import torch
from contact_cases import make_model, random_ids
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gistkern
from gistkern.cache.fingerprint import fingerprint
from gistkern.cache.packed import sample_before_packing

functional = pytest.importorskip("bitsandbytes.functional")
# what it packs: rows by 32, columns by its block of 64
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def four_bits(tmp_path):
    """Function (nested scales?) -> a patched model in 4 bits, of the same weights each time."""
    make_model(**SIZES).save_pretrained(tmp_path)

    def load(nested):
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=nested
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings).eval()
        torch.manual_seed(0)
        gistkern.patch(model, num_gist_tokens=2)
        return model

    return load


def packed_anew(model):
    """As a forward on a processor with AVX512-BF16 does it; on others nothing does."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            weight = module.weight
            if not getattr(weight.quant_state, "packing_format_for_cpu", False):
                weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(
                    weight.data, weight.quant_state
                )


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested-scales"])
@pytest.mark.filterwarnings("ignore:the gist rows were never trained")
def test_packing_makes_no_other_model(four_bits, nested, tmp_path):
    model = four_bits(nested)
    before = fingerprint(model.gistkern_handle.inner)
    packed_anew(model)
    assert fingerprint(model.gistkern_handle.inner) == before
    other = four_bits(nested)
    with torch.no_grad():
        next(m for m in other.modules() if type(m).__name__ == "Linear4bit").weight[::7] ^= 0x11
    changed = fingerprint(other.gistkern_handle.inner)
    packed_anew(other)
    assert fingerprint(other.gistkern_handle.inner) == changed != before


@pytest.mark.parametrize("step", [1, 3, 64, 1000])
def test_samples_are_the_bytes_before_packing(four_bits, step):
    model = four_bits(False)
    linear = model.model.layers[0].mlp.up_proj
    loaded = linear.weight.data.flatten().clone()
    packed_anew(model)
    assert linear.weight.quant_state.packing_format_for_cpu
    assert torch.equal(sample_before_packing(linear.weight, step), loaded[::step])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the gist rows were never trained")
def test_a_cache_is_read_back_after_the_first_forward(four_bits, tmp_path):
    model, question = four_bits(False), random_ids(5, 2)
    cache = gistkern.compress(model, random_ids(11), segment_length=4)
    cache.save(tmp_path / "cache.safetensors")
    expected = model(question, past_key_values=cache).logits
    read = gistkern.GistCache.load(tmp_path / "cache.safetensors", four_bits(False))
    again = model(question, past_key_values=gistkern.GistCache.load(tmp_path / "cache.safetensors", model)).logits
    assert torch.equal(again, expected)
    assert read.fingerprint == cache.fingerprint
