"""A cache of fixed size under layers with sliding windows and learned sinks."""

import pytest
import torch
from conftest import random_ids
from test_windows import make_model

import gistkern

pytestmark = pytest.mark.filterwarnings("ignore:the gist rows were never trained")


@pytest.mark.parametrize("family", ["cohere2", "gemma3_text", "gpt_oss", "mistral", "qwen3"])
@pytest.mark.parametrize("window", [1, 4, 9])
@torch.no_grad()
def test_logits_and_answers_are_the_ordinary_caches(family, window):
    model = make_model(family, window).float()
    gistkern.patch(model, num_gist_tokens=3)
    contexts, real = gistkern.left_padded([random_ids(1, n, n)[0] for n in (26, 9)])
    cache = gistkern.compress(model, contexts, real, segment_length=10)
    fixed, ordinary = cache.fixed(60), cache.clone()
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 11])
    for tokens, shown in ((11, mask), (1, None), (9, None), (1, None)):
        ids = random_ids(2, tokens, tokens)
        found, plain = (model(ids, attention_mask=shown, past_key_values=one).logits for one in (fixed, ordinary))
        seen = slice(None) if shown is None else shown == 1
        torch.testing.assert_close(found[seen], plain[seen], rtol=1e-4, atol=1e-4)
    ids, options = random_ids(2, 11, 3), {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    fixed.reset_tail()
    answers = [model.generate(ids, past_key_values=one, **options) for one in (fixed, cache)]
    assert torch.equal(*answers)


@torch.no_grad()
def test_one_graph_for_all_steps():
    """A layer that slides, one that does not, learned sinks in both."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # the experts of eager mode are a loop over values, which no graph holds
    changes = {"layer_types": ["sliding_attention", "full_attention"], "experts_implementation": "batched_mm"}
    model = make_model("gpt_oss", num_hidden_layers=2, **changes).float()
    gistkern.patch(model, num_gist_tokens=3)
    cache = gistkern.compress(model, random_ids(1, 26))
    fixed, compiled = cache.fixed(12), torch.compile(model, fullgraph=True, backend="eager")
    for step in range(8):
        token = random_ids(1, 1, step)
        found, plain = (one(token, past_key_values=held).logits for one, held in ((compiled, fixed), (model, cache)))
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
