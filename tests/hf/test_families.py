"""Models that can be patched and models that cannot: refused before anything changes, with advice that helps."""

import re

import pytest
import torch
from conftest import ALL_FAMILIES, is_here, make_model, random_ids
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import gistkern
from gistkern.cache.rotation import check_rotation
from gistkern.cache.versions import CACHE
from gistkern.hf.families import FAMILIES
from gistkern.hf.refusals import REFUSALS, refuse


@pytest.mark.parametrize(
    "kind", [LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering]
)
def test_a_classifier_is_left_as_it_was(kind):
    model = kind(make_model().config).eval()
    before = set(vars(model)), model(random_ids(1, 6))[0]
    for _ in range(2):
        with pytest.raises(TypeError, match=r"ForCausalLM\), or the inner model"):
            gistkern.patch_llama(model)
    assert set(vars(model)) == before[0]
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(random_ids(1, 6))[0], before[1])


@torch.no_grad()
def test_the_inner_model_of_a_classifier_compresses_for_it(model):
    classifier = LlamaForSequenceClassification(model.config).double().eval()
    plain = classifier(random_ids(1, 6)).logits
    handle = gistkern.patch_llama(classifier.model, num_gist_tokens=2)
    torch.testing.assert_close(classifier(random_ids(1, 6)).logits, plain)
    context, question = random_ids(1, 9), random_ids(1, 4, 2)
    stream = torch.cat([context, torch.tensor([handle.gist_token_ids]), question], 1)
    cached = classifier(question, past_key_values=gistkern.compress(classifier.model, context)).logits
    torch.testing.assert_close(cached, classifier(stream).logits)
    with pytest.raises(ValueError, match="only the model's inner model is patched"):
        gistkern.compress(classifier, context)


@torch.no_grad()
def test_advice_on_windows_that_are_no_part_of_a_family_helps(tmp_path):
    model = make_model("llama", sliding_window=8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load the model so: ") as error:
        gistkern.patch_llama(model)
    names = {"path": tmp_path, "AutoConfig": AutoConfig, "AutoModelForCausalLM": AutoModelForCausalLM}
    exec(str(error.value).split("load the model so: ")[1], names)
    gistkern.patch_llama(names["model"]).unpatch()
    ids = random_ids(1, 20)
    plain = names["model"](ids).logits
    with gistkern.patch_llama(names["model"]):
        torch.testing.assert_close(names["model"](ids).logits, plain)


def test_a_window_that_no_layer_uses_is_no_window():
    model = make_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=9)
    gistkern.patch_llama(model).unpatch()


ROTATIONS = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    "old-name": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 4.0,
            "long_factor": [2.0] * 8,
            "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_rotations_by_length_are_refused(rotation):
    model = make_model(max_position_embeddings=128, **rotation)
    with pytest.raises(ValueError, match="turns keys by the length of the text"):
        gistkern.patch_llama(model)
    assert not hasattr(model.model, "gist_embeddings")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="turns keys by the length of the text"):
        gistkern.patch_llama(model)  # what the model was built with counts


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotations_by_fixed_frequencies_are_taken(kind):
    scaled = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 2048}
    gistkern.patch_llama(make_model(rope_parameters=scaled)).unpatch()


def test_rotations_by_layer_type_are_all_read():
    class Config:
        rope_parameters = {"full_attention": {"rope_type": "default"}, "other": {"rope_type": "dynamic"}}  # noqa: RUF012

    with pytest.raises(ValueError, match="'dynamic'"):
        check_rotation(Config)


@torch.no_grad()
def test_a_rotation_called_dynamic_that_is_fixed():
    """HunYuan's alpha; the same words mean nothing to a Llama, which turns by the length."""
    alpha = {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}}
    model, context, question = make_model("hunyuan_v1_dense", **alpha), random_ids(1, 30), random_ids(1, 5, 2)
    if model.model.rotary_emb.rope_type == "dynamic":
        with pytest.raises(ValueError, match="'dynamic' turns keys by the length"):
            gistkern.patch(model)
        pytest.skip("this transformers turns HunYuan's keys by the length too")
    with gistkern.patch(model, num_gist_tokens=2):
        cache = gistkern.compress(model, context)
        expected = model(question, **{CACHE: cache.clone()}).logits
    found = model(question, **{CACHE: gistkern.plain_prefix(cache, model.config)}).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'dynamic' turns keys by the length"):
        gistkern.patch(make_model(**alpha))


def test_a_wrapped_model_is_named(model):
    with pytest.raises(TypeError, match=r"got OptimizedModule: patch the model itself, then wrap it"):
        gistkern.patch_llama(torch.compile(model, backend="eager"))
    assert isinstance(model, LlamaForCausalLM)


def test_every_row_is_held_by_the_acceptance_tests():
    assert set(FAMILIES) == set(ALL_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_is_refused(family):
    if not is_here(family):
        assert FAMILIES[family].since, "the row says that transformers 5.6 has it"
        pytest.skip(f"this transformers has no {family}")
    refuse(make_model(family).config)


@pytest.mark.parametrize(("row", "kind"), [(row, kind) for row in REFUSALS for kind in row.model_types])
def test_others_are_told_what_stands_in_the_way(row, kind):
    """By their config's features: those of the row, and of none before it."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    with pytest.raises(
        TypeError, match=rf"models of type '{kind}' cannot be patched: .*{re.escape(row.feature)}, {row.why}"
    ):
        refuse(CONFIG_MAPPING[kind]())


def test_a_feature_is_found_in_a_family_that_nobody_knows(model):
    """Code of one's own (trust_remote_code) is told the reason too, and nothing is touched."""
    model.config.model_type = "mine"
    with pytest.raises(
        TypeError, match=r"'mine' are not supported: expected one of .*llama.*docs/reference/families.md"
    ):
        gistkern.patch_llama(model)
    model.config.attn_logit_softcapping = 30.0
    with pytest.raises(TypeError, match="soft-capped attention scores, which the attention kernels do not compute"):
        gistkern.patch_llama(model)
    assert not hasattr(model.model, "gist_embeddings")


@torch.no_grad()
def test_granite_4_is_taken_without_its_recurrent_layers():
    if not is_here("granitemoehybrid"):
        pytest.skip("this transformers names its layers otherwise")
    model = make_model("granitemoehybrid", position_embedding_type=None)  # as some releases are: nothing is rotated
    with gistkern.patch(model, num_gist_tokens=2):
        cache = gistkern.compress(model, random_ids(1, 30))
        expected = model(random_ids(1, 5, 2), **{CACHE: cache.clone()}).logits
    found = model(random_ids(1, 5, 2), **{CACHE: gistkern.plain_prefix(cache, model.config)}).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    mixed = make_model("granitemoehybrid", layer_types=["linear_attention", "full_attention", "linear_attention"])
    with pytest.raises(TypeError, match="recurrent layers"):
        gistkern.patch(mixed)
