"""A small Llama for tests with other packages, and streams for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gistkern

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
WITH_ROWS = {**LORA, "modules_to_save": ["gist_embeddings"]}


def make_model(**changes):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"vocab_size": 100, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **rest, "initializer_range": 0.1, **changes})).eval()


def random_ids(tokens, seed=1):
    return torch.randint(1, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))


def patched(gists=3, trained=True, **changes):
    """A patched model, its handle, and a stream of context, gist tokens and question."""
    model = make_model(**changes)
    handle = gistkern.patch_llama(model, num_gist_tokens=gists)
    if trained:
        train(handle)
    return model, handle, torch.cat([random_ids(9), torch.tensor([handle.gist_token_ids]), random_ids(4, 2)], 1)


def train(handle, by=0.01):
    """Move the rows in use from where patching drew them."""
    with torch.no_grad():
        for rows in handle.trainable_parameters():
            rows += by
