"""Configs as released: what their config.json says, under the names and in the forms it says it.

Kept: what makes a release differ from a tiny model of its family (vocabulary, ties, heads, rotation, scalings, windows,
layer types, special tokens). Left out: initializers, dtypes, versions. `reduced` says what a test shrinks.
"""

from __future__ import annotations

import copy

LLAMA3 = {
    **{"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}


def sizes(vocabulary, hidden, intermediate, layers, heads, key_heads, positions):
    """What every config has."""
    return {
        **{"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads},
        "max_position_embeddings": positions,
    }


def tokens(bos, eos, pad=None):
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

PUBLISHED = {
    "apertus-8b": {
        **sizes(131072, 4096, 21504, 32, 32, 8, 65536),
        **{**tokens(1, 68, 3), **UNTIED, "model_type": "apertus", "hidden_act": "xielu", "rope_theta": 12e6},
        "rope_scaling": {**LLAMA3, "factor": 8.0},
    },
    "bitnet-b1.58-2b-4t": {
        **sizes(128256, 2560, 6912, 30, 20, 5, 4096),
        **{**tokens(128000, 128001), **TIED, "model_type": "bitnet", "hidden_act": "relu2", "rope_theta": 500000.0},
    },
    "command-r-plus": {
        **sizes(256000, 12288, 33792, 64, 96, 8, 131072),
        **{**tokens(5, 255001, 0), **TIED, "model_type": "cohere", "rope_theta": 75e6, "use_qk_norm": True},
        "logit_scale": 0.8333333333333334,
    },
    "command-r7b-12-2024": {
        **sizes(256000, 4096, 14336, 32, 32, 8, 132096),
        **{**tokens(5, 255001, 0), **TIED, "model_type": "cohere2", "rope_theta": 50000.0, "head_dim": 128},
        **{"sliding_window": 4096, "sliding_window_pattern": 4, "logit_scale": 0.25},
    },
    "ernie-4.5-0.3b": {
        **sizes(103424, 1024, 3072, 18, 16, 2, 131072),
        **{
            **tokens(1, 2, 0),
            **TIED,
            "model_type": "ernie4_5",
            "rope_theta": 500000.0,
            "head_dim": 128,
            "use_bias": False,
        },
    },
    "exaone-4.0-1.2b": {
        **sizes(102400, 2048, 4096, 30, 32, 8, 65536),
        **{**tokens(1, 361, 0), **TIED, "model_type": "exaone4", "rope_theta": 1000000, "head_dim": 64},
        **{"rope_scaling": {**LLAMA3, "factor": 16.0}, "sliding_window": None, "sliding_window_pattern": None},
        "layer_types": ["full_attention"] * 30,
    },
    "exaone-4.0-32b": {
        **sizes(102400, 5120, 27392, 64, 40, 8, 131072),
        **{**tokens(1, 361, 0), **UNTIED, "model_type": "exaone4", "rope_theta": 1000000, "head_dim": 128},
        **{"rope_scaling": {**LLAMA3, "factor": 16.0}, "sliding_window": 4096, "sliding_window_pattern": 4},
    },
    "gemma-2b": {
        **sizes(256000, 2048, 16384, 18, 8, 1, 8192),
        **{
            **tokens(2, 1, 0),
            **TIED,
            "model_type": "gemma",
            "rope_theta": 10000.0,
            "head_dim": 256,
            "hidden_act": "gelu",
        },
    },
    "gemma-3-1b": {
        **sizes(262144, 1152, 6912, 26, 4, 1, 32768),
        **{
            **tokens(2, [1, 106], 0),
            **TIED,
            "model_type": "gemma3_text",
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
        },
        **{"rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window": 512, "sliding_window_pattern": 6},
    },
    "glm-4-9b-0414": {
        **sizes(151552, 4096, 13696, 40, 32, 2, 32768),
        **{**tokens(None, [151329, 151336, 151338], 151329), **UNTIED, "model_type": "glm4", "head_dim": 128},
        **{"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "attention_bias": False},
    },
    "gpt-oss-20b": {
        **sizes(201088, 2880, 2880, 24, 64, 8, 131072),
        **{**tokens(None, 200002, 199999), **UNTIED, "model_type": "gpt_oss", "head_dim": 64, "attention_bias": True},
        **{"num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150000},
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
    },
    "granite-3.1-3b-a800m": {
        **sizes(49155, 1536, 512, 32, 24, 8, 131072),
        **{**tokens(0, 0, 0), **TIED, "model_type": "granitemoe", "rope_theta": 10000000.0},
        **{"num_local_experts": 40, "num_experts_per_tok": 8, "attention_multiplier": 0.015625},
        **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    },
    "granite-4.1-3b": {
        **sizes(100352, 2560, 8192, 40, 40, 8, 131072),
        **{**tokens(100257, 100257, 100256), **TIED, "model_type": "granite", "rope_theta": 10000000},
        **{"attention_multiplier": 0.015625, "embedding_multiplier": 12, "residual_multiplier": 0.22},
        "logits_scaling": 10,
    },
    "hunyuan-0.5b": {
        **sizes(120818, 1024, 3584, 24, 16, 8, 262144),
        **{**tokens(120000, 120020, 120002), **TIED, "model_type": "hunyuan_v1_dense", "head_dim": 128},
        **{"rope_theta": 10000.0, "use_qk_norm": True},
        "rope_scaling": {
            **{"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1},
            **{"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    },
    "llama-3.1-8b-instruct": {
        **sizes(128256, 4096, 14336, 32, 32, 8, 131072),
        **{**tokens(128000, [128001, 128008, 128009]), **UNTIED, "model_type": "llama", "rope_theta": 500000.0},
        "rope_scaling": {**LLAMA3, "factor": 8.0},
    },
    "llama-3.2-1b": {
        **sizes(128256, 2048, 8192, 16, 32, 8, 131072),
        **{**tokens(128000, 128001), **TIED, "model_type": "llama", "rope_theta": 500000.0, "head_dim": 64},
        "rope_scaling": {**LLAMA3, "factor": 32.0},
    },
    "mistral-7b-v0.1": {
        **sizes(32000, 4096, 14336, 32, 32, 8, 32768),
        **{**tokens(1, 2), **UNTIED, "model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096},
    },
    "mistral-7b-v0.3": {
        **sizes(32768, 4096, 14336, 32, 32, 8, 32768),
        **{**tokens(1, 2), **UNTIED, "model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
    },
    "mistral-nemo-2407": {
        **sizes(131072, 5120, 14336, 40, 32, 8, 131072),
        **{**tokens(1, 2), **UNTIED, "model_type": "mistral", "rope_theta": 1000000.0, "head_dim": 128},
        "sliding_window": None,
    },
    "mixtral-8x7b-v0.1": {
        **sizes(32000, 4096, 14336, 32, 32, 8, 32768),
        **{**tokens(1, 2), **UNTIED, "model_type": "mixtral", "rope_theta": 1000000.0, "sliding_window": None},
        **{"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
    },
    "olmo-2-7b": {
        **sizes(100352, 4096, 11008, 32, 32, 32, 4096),
        **{**tokens(None, 100257, 100277), **UNTIED, "model_type": "olmo2", "rope_theta": 500000, "rms_norm_eps": 1e-6},
    },
    "olmo-3-7b": {
        **sizes(100278, 4096, 11008, 32, 32, 32, 65536),
        **{**tokens(None, 100257, 100277), **UNTIED, "model_type": "olmo3", "rope_theta": 500000},
        "sliding_window": 4096,
        "layer_types": ([*["sliding_attention"] * 3, "full_attention"] * 8),
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 8.0, "beta_fast": 32, "beta_slow": 1},
            **{"attention_factor": 1.2079441541679836, "original_max_position_embeddings": 8192},
        },
    },
    "olmoe-1b-7b-0924": {
        **sizes(50304, 2048, 1024, 16, 16, 16, 4096),
        **{**tokens(None, 50279, 1), **UNTIED, "model_type": "olmoe", "rope_theta": 10000.0, "clip_qkv": None},
        **{"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
    },
    "phi-2": {
        **sizes(51200, 2560, 10240, 32, 32, 32, 2048),
        **{**tokens(50256, 50256), **UNTIED, "model_type": "phi", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        **{"resid_pdrop": 0.1, "hidden_act": "gelu_new", "qk_layernorm": False},
    },
    "phi-3-mini-4k": {
        **sizes(32064, 3072, 8192, 32, 32, 32, 4096),
        **{**tokens(1, 32000, 32000), **UNTIED, "model_type": "phi3", "rope_theta": 10000.0, "sliding_window": 2047},
        **{"rope_scaling": None, "original_max_position_embeddings": 4096},
    },
    "phi-4": {
        **sizes(100352, 5120, 17920, 40, 40, 10, 16384),
        **{**tokens(100257, 100265, 100349), **UNTIED, "model_type": "phi3", "rope_theta": 250000},
        **{"sliding_window": None, "rope_scaling": None, "original_max_position_embeddings": 16384},
    },
    "pythia-160m": {
        **sizes(50304, 768, 3072, 12, 12, 12, 2048),
        **{**tokens(0, 0), **UNTIED, "model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10000},
        **{"hidden_act": "gelu", "use_parallel_residual": True},
    },
    "qwen1.5-moe-a2.7b": {
        **sizes(151936, 2048, 5632, 24, 16, 16, 8192),
        **{**tokens(151643, 151643), **UNTIED, "model_type": "qwen2_moe", "rope_theta": 1000000.0},
        **{"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False},
        **{"shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False},
        "max_window_layers": 21,
    },
    "qwen2.5-0.5b": {
        **sizes(151936, 896, 4864, 24, 14, 2, 32768),
        **{**tokens(151643, 151643), **TIED, "model_type": "qwen2", "rope_theta": 1000000.0, "sliding_window": 32768},
        **{"use_sliding_window": False, "max_window_layers": 24},
    },
    "qwen2.5-7b-instruct": {
        **sizes(152064, 3584, 18944, 28, 28, 4, 32768),
        **{
            **tokens(151643, 151645),
            **UNTIED,
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
        },
        **{"use_sliding_window": False, "max_window_layers": 28},
    },
    "qwen3-0.6b": {
        **sizes(151936, 1024, 3072, 28, 16, 8, 40960),
        **{**tokens(151643, 151645), **TIED, "model_type": "qwen3", "rope_theta": 1000000, "head_dim": 128},
        **{"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28},
    },
    "qwen3-30b-a3b": {
        **sizes(151936, 2048, 6144, 48, 32, 4, 40960),
        **{**tokens(151643, 151645), **UNTIED, "model_type": "qwen3_moe", "rope_theta": 1000000.0, "head_dim": 128},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
        **{"sliding_window": None, "use_sliding_window": False, "max_window_layers": 48, "decoder_sparse_step": 1},
    },
    "seed-oss-36b": {
        **sizes(155136, 5120, 27648, 64, 80, 8, 524288),
        **{**tokens(0, 2, 1), **UNTIED, "model_type": "seed_oss", "rope_theta": 10000000.0, "head_dim": 128},
        **{"attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1, "residual_dropout": 0.1},
        "rope_scaling": {"rope_type": "default"},
    },
    "smollm3-3b": {
        **sizes(128256, 2048, 11008, 36, 16, 4, 65536),
        **{**tokens(128000, 128012, 128004), **TIED, "model_type": "smollm3", "rope_theta": 5000000.0},
        **{"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "sliding_window": None},
        "use_sliding_window": False,
    },
    "starcoder2-3b": {
        **sizes(49152, 3072, 12288, 30, 24, 2, 16384),
        **{**tokens(0, 0), **TIED, "model_type": "starcoder2", "rope_theta": 999999.4420358813},
        **{"sliding_window": 4096, "use_bias": True, "attention_dropout": 0.1, "embedding_dropout": 0.1},
    },
}

LONG = {"type": "longrope", "long_factor": [4.0] * 48, "short_factor": [1.0] * 48}
# refused, with words of the message; a rotation's factors are not the published ones: only its kind counts
REFUSED = {
    "deepseek-v3": (
        {**sizes(129280, 7168, 18432, 61, 128, 128, 163840), "model_type": "deepseek_v3", "kv_lora_rank": 512},
        "multi-head latent attention",
    ),
    "gemma-2-2b": (
        {
            **sizes(256000, 2304, 9216, 26, 8, 4, 8192),
            **{"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        },
        "soft-capped attention scores",
    ),
    "llama-4-scout": (
        {**sizes(202048, 5120, 8192, 48, 40, 8, 10485760), "model_type": "llama4_text", "attention_chunk_size": 8192},
        "chunked attention",
    ),
    "phi-3-mini-128k": (
        {
            **sizes(32064, 3072, 8192, 32, 32, 32, 131072),
            **{**tokens(1, 32000, 32000), "model_type": "phi3", "rope_theta": 10000.0, "sliding_window": 262144},
            **{"rope_scaling": LONG, "original_max_position_embeddings": 4096},
        },
        "rope_type 'longrope' turns keys by the length of the text",
    ),
    "qwen3-next-80b-a3b": (
        {**sizes(151936, 2048, 5120, 48, 16, 2, 262144), "model_type": "qwen3_next", "linear_num_key_heads": 16},
        "recurrent layers",
    ),
}


def reduced(config):
    """A released config, of few layers and small widths: what it is known by stays.

    Layers are cut to one period of their types (two where all are alike), key/value heads to one with as many query
    heads to it as released (two where those are few), heads to a width of 8 (or the next of which an even number is
    turned), the hidden width in proportion to that of all heads, and experts to 16. Vocabulary, special tokens,
    rotation, windows, scalings and ties stay.
    """
    given = copy.deepcopy(config)
    heads, keys = given["num_attention_heads"], given["num_key_value_heads"]
    wide = given.get("head_dim", given["hidden_size"] // heads)
    turned = given.get("partial_rotary_factor", given.get("rotary_pct", 1.0))
    narrow = next(width for width in range(8, 64, 2) if int(width * turned) % 2 == 0)
    few = min(keys, 2 if heads // keys < 4 else 1)
    small = {
        **{"num_attention_heads": heads // keys * few, "num_key_value_heads": few, "num_hidden_layers": 2},
        "hidden_size": round(given["hidden_size"] * few / (keys * wide)) * narrow,
        "intermediate_size": 96,
    }
    small |= {name: 32 for name in ("moe_intermediate_size", "shared_expert_intermediate_size") if name in given}
    small |= {name: min(given[name], 16) for name in ("num_experts", "num_local_experts") if name in given}
    small |= {"head_dim": narrow} if "head_dim" in given else {}
    period = given.get("sliding_window_pattern", given.get("no_rope_layer_interval"))
    if "layer_types" in given:
        period = given["layer_types"].index("full_attention") + 1
    small |= {"num_hidden_layers": period} if period else {}
    small |= {
        name: given[name][: small["num_hidden_layers"]] for name in ("layer_types", "no_rope_layers") if name in given
    }
    return {**given, **small}
