"""A small random Llama, the three gist schemes, and features for a collator."""

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gistkern

VOCABULARY = 60
SCHEMES = {
    "single": ({"num_gist_tokens": 3}, {}),
    "segments": ({"num_gist_tokens": 2, "sink_tokens": 2}, {"segment_length": 5, "segment_overlap": 2}),
    "hierarchical": (
        {"num_gist_tokens": 3, "num_segment_gist_tokens": 2, "sink_tokens": 1},
        {"segment_length": 6, "segment_overlap": 1},
    ),
}


def make_model(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**config)).to(dtype)


def patched(scheme="single", positions="absolute", **changes):
    """(model, handle, the segments that `compress` and the collator take)."""
    settings, segments = SCHEMES[scheme]
    model = make_model(**changes)
    return model, gistkern.patch_llama(model, positions=positions, **settings), segments


def make_features(count, seed=0, span=False):
    """Ragged samples: contexts of 4 to 20 tokens, questions of 1 to 3, answers of 1 to 4."""
    rng = random.Random(seed)

    def draw(least, most):
        return [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(least, most))]

    features = [
        {"context_ids": draw(4, 20), "question_ids": draw(1, 3), "answer_ids": draw(1, 4)} for _ in range(count)
    ]
    for feature in features if span else ():
        feature["span_ids"] = feature["context_ids"][1:4]
    return features


def lora(model, **changes):
    from peft import LoraConfig, get_peft_model

    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["gist_embeddings"]}
    return get_peft_model(model, LoraConfig(**{"r": 2, **targets, **changes}))


def arguments(folder, **changes):
    """TrainingArguments of a few plain SGD steps on the CPU; weights then tell gradients."""
    from transformers import TrainingArguments

    given = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return TrainingArguments(output_dir=str(folder), **given)
