"""Small random models of every supported family, in fp64 so that equal means equal."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def make_model(family="llama", dtype=torch.float64, seed=0, **changes):
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        **{
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **extra,
            **changes,
        }
    )
    return model_class(config).to(dtype).eval()


@pytest.fixture
def model():
    return make_model()


def random_ids(batch, tokens, seed=1):
    return torch.randint(1, 100, (batch, tokens), generator=torch.Generator().manual_seed(seed))
