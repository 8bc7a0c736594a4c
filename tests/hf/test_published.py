"""Configs as they were released (published.py), reduced in width and depth alone."""

import pytest
import torch
from published import PUBLISHED, REFUSED, reduced
from test_acceptance import full_stream
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import gistkern
from gistkern.cache.versions import CACHE
from gistkern.cache.windows import layer_windows


def build(values):
    """The model that ``from_pretrained`` makes of a config.json."""
    if values["model_type"] not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {values['model_type']}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**values, initializer_range=0.1, experts_implementation="eager")
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_a_released_config(name):
    """Compressed decoding gives the masked stream's logits, greedy answers come from them, and nothing else changed."""
    model = build(reduced(PUBLISHED[name]))
    if getattr(model.base_model.rotary_emb, "rope_type", "") == "dynamic":
        pytest.skip("this transformers turns HunYuan's keys by the length of the text")
    size = PUBLISHED[name]["vocab_size"]
    assert model.get_input_embeddings().num_embeddings == size
    generator = torch.Generator().manual_seed(0)
    context, question = (torch.randint(size, (1, length), generator=generator) for length in (50, 6))
    plain = model(context, logits_to_keep=6).logits
    with gistkern.patch(model, num_gist_tokens=3, positions="gist_first") as handle:
        assert handle.gist_token_ids == [size, size + 1, size + 2]
        torch.testing.assert_close(model(context, use_cache=False, logits_to_keep=6).logits, plain, rtol=0, atol=1e-9)
        cache = gistkern.compress(model, context, segment_length=20)
        stream, _ = full_stream(handle, context[0], question[0], 20)
        expected = model(stream[None], use_cache=False, logits_to_keep=6).logits
        torch.testing.assert_close(model(question, **{CACHE: cache.clone()}).logits, expected, rtol=0, atol=1e-9)
        said = model.generate(question, max_new_tokens=3, do_sample=False, **{CACHE: cache.clone()})
        assert said[0, 6] == expected[0, -1].argmax()
    if not any(layer_windows(model.config)):
        found = model(question, **{CACHE: gistkern.plain_prefix(cache, model.config)}).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("values", "words"), REFUSED.values(), ids=REFUSED)
def test_a_released_config_that_is_refused(values, words):
    with torch.device("meta"):
        model = build(values | {"num_hidden_layers": 2})
    with pytest.raises((TypeError, ValueError), match=words):
        gistkern.patch(model)
