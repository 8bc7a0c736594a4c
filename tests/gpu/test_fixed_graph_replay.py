"""A CUDA graph of a model's step over a cache of fixed size (tests/hf/test_fixed_graph.py says why it can be one)."""

import pytest
import torch
from emulation import EMULATED
from transformers import LlamaConfig, LlamaForCausalLM

import gistkern

pytestmark = pytest.mark.filterwarnings("ignore:the gist rows were never trained")


@torch.no_grad()
@pytest.mark.skipif(EMULATED, reason="captures a CUDA graph, which takes a GPU")
@pytest.mark.parametrize("gist_dtype", [None, torch.int8], ids=str)
def test_a_captured_step_is_every_later_one(gist_dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    gistkern.patch(model, num_gist_tokens=2)
    cache = gistkern.compress(model, torch.randint(99, (2, 700), device="cuda"), gist_dtype=gist_dtype)
    eager, replayed = cache.fixed(16), cache.fixed(16)
    ids, graph = torch.zeros(2, 1, dtype=torch.long, device="cuda"), torch.cuda.CUDAGraph()
    model(ids, past_key_values=replayed)  # whatever happens once
    with torch.cuda.graph(graph):
        logits = model(ids, past_key_values=replayed).logits
    replayed.reset_tail()
    for _ in range(12):
        ids.random_(99)
        graph.replay()
        assert torch.equal(logits, model(ids, past_key_values=eager).logits)
    assert torch.equal(replayed.length, eager.length)
