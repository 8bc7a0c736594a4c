"""Small random models of every supported family, in fp64 so that equal means equal."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gistkern.hf.families import FAMILIES as ROWS

GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
MIXED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS, LOCAL = {**MIXED, "num_experts": 4}, {**MIXED, "num_local_experts": 4}
SLIDES = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
ROUTED = {**MIXED, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 16}

# what a family's tiny config has beside the sizes below
ALL_FAMILIES = {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": SLIDES,
    "dots1": {**ROUTED, "first_k_dense_replace": 1},
    "ernie4_5": {"head_dim": 16},
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 32},
        **{"moe_layer_start_index": 1, "moe_layer_end_index": 2},
    },
    "exaone": {},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "flex_olmo": EXPERTS,
    "gemma": {"head_dim": 16},
    "gemma3_text": {**SLIDES, "head_dim": 16},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1},
    "gpt_neox": {"num_key_value_heads": None},
    "gpt_oss": {**SLIDES, **LOCAL, "head_dim": 16},
    "granite": GRANITE,
    "granitemoe": {**GRANITE, **LOCAL},
    "granitemoehybrid": {
        **{**GRANITE, "layer_types": ["full_attention"] * 3, "num_local_experts": 0, "num_experts_per_tok": 0},
        **{"shared_intermediate_size": 96, "position_embedding_type": "rope"},
    },
    "granitemoeshared": {**GRANITE, **LOCAL, "shared_intermediate_size": 32},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {**EXPERTS, "head_dim": 16, "moe_topk": 2},
    "hy_v3": {
        **EXPERTS,
        **LOCAL,
        "head_dim": 16,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * 2,
    },
    "hyperclovax": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0},
    "internlm3": {"head_dim": 16},
    "iquestcoder": {"head_dim": 16},
    "jais2": {},
    "llama": {},
    "minimax_m2": {**LOCAL, "head_dim": 16, "rotary_dim": 8},
    "ministral": {**SLIDES, "head_dim": 16},
    "ministral3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "mixtral": LOCAL,
    "nanochat": {},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": SLIDES,
    "olmoe": EXPERTS,
    "persimmon": {"num_key_value_heads": 4},
    "phi": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "phimoe": LOCAL,
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "sarvam_moe": {**EXPERTS, **ROUTED, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "seed_oss": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 2},
    "solar_open": ROUTED,
    "starcoder2": {"sliding_window": None},
}


def is_here(name):
    """Whether this transformers has a family: 5.6 lacks some."""
    since = ROWS[name].since if name in ROWS else ""
    return name in CONFIG_MAPPING_NAMES and Version(transformers.__version__) >= Version(since or "0")


FAMILIES = {name: extra for name, extra in ALL_FAMILIES.items() if is_here(name)}

# their routers round scores to fp32, whatever the model computes in
FP32_ROUTERS = {"dots1", "glm4_moe", "hy_v3", "minimax_m2", "sarvam_moe", "solar_open"}


def tolerance(family):
    """Of two fp64 computations of the same numbers."""
    return {"rtol": 0, "atol": 1e-5 if family in FP32_ROUTERS else 1e-12}


def class_of(family):
    """The causal model of a family, in this transformers."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])


def make_model(family="llama", dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, CONFIG_MAPPING_NAMES[family])(
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
            "experts_implementation": "eager",  # transformers' default multiplies no doubles
            **FAMILIES[family],
            **changes,
        }
    )
    return class_of(family)(config).to(dtype).eval()


@pytest.fixture
def model():
    return make_model()


def random_ids(batch, tokens, seed=1):
    return torch.randint(1, 100, (batch, tokens), generator=torch.Generator().manual_seed(seed))
