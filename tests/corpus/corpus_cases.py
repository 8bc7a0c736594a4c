"""The model and the documents of the corpus tests, the same in every process."""

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gistkern import patch_llama

WORDS = 60
SMALL = {"batch_tokens": 200, "chunk_documents": 8, "progress": False}  # several batches and files


def patched(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return patch_llama(LlamaForCausalLM(config).eval(), num_gist_tokens=3, **options)


def documents(count, least=5, most=60, seed=0):
    rng = random.Random(seed)
    return {f"doc-{i}": [rng.randrange(WORDS) for _ in range(rng.randint(least, most))] for i in range(count)}
