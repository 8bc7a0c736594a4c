"""Decoding: the op over rows and batches, and whole models over a GistCache and a DynamicCache."""

import pytest

from bench.measured import decoding
from bench.measured.case import OURS
from bench.measured.decoding import decoding_case
from bench.measured.models import FULL, model_decoding_case

SIZES = [(10, 16, 1), (10, 16, 16), (10, 16, 256), (1024, 64, 16), (16384, 64, 1)]


@pytest.mark.parametrize("name", [OURS, *decoding.BASELINES])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}+{} rows, batch {}".format(*size))
def test_op(timed, device, size, name):
    case = decoding_case(*size, "Llama-3-8B", device, [name] if name != OURS else [])
    timed(case, name, "decoding, {}+{} rows, batch {}".format(*size))


@pytest.mark.parametrize("name", [OURS, FULL])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("context", [64, 4096])
def test_model(timed, device, context, batch, name):
    case, _ = model_decoding_case("SmolLM2-135M, 4 of 30 layers", context, batch, device)
    timed(case, name, f"a model's step after {context} tokens, batch {batch}")
