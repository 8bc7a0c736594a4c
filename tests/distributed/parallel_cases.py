"""Layouts, inputs and models of the tests of context parallelism, the same in every process."""

import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from gistkern import GistLayout, patch_llama
from gistkern.testing import make_inputs


def _segments():
    return GistLayout.from_segments([30, 7, 41, 12, 25, 3, 18], 4, tail=19)


def _hierarchical():
    return GistLayout.hierarchical([20, 33, 9, 27, 14], 3, 5, tail=11, sink_tokens=2)


def _seeing():
    return GistLayout.hierarchical([20, 33, 9, 27, 14], 3, 5, tail=11, see_earlier_gists=True)


def _sliding():
    return GistLayout.sliding(160, 24, 16, gists=2)


def _packed():
    return GistLayout.pack([_segments(), GistLayout.from_segments([9, 22], [2, 3], tail=6), _hierarchical()])


def _ragged():
    """A batch with padding on the left, whose segments end at different rows."""
    return GistLayout.stack([GistLayout.from_segments([17, 20, 11, 8], 4, tail=9), _segments()])


def _long_segment():
    """Longer than a shard of four: its rows come from the rank before."""
    return GistLayout.from_segments([10, 60, 10], 4, tail=40)


def _windowed():
    """Of layers with a sliding window, shorter than most segments."""
    return _ragged().windowed(9)


LAYOUTS = {
    "segments": _segments,
    "hierarchical": _hierarchical,
    "hierarchical, seeing": _seeing,
    "sliding": _sliding,
    "packed": _packed,
    "ragged": _ragged,
    "long segment": _long_segment,
    "windowed": _windowed,
}


def layout_of(name):
    return LAYOUTS[name]()


def op_inputs(layout):
    return make_inputs(layout, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64)


# a plain model, and one whose layers have a sliding window or not, and learned sinks
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "gpt_oss": (
        *(GptOssConfig, GptOssForCausalLM),
        {
            **{"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
            **{"experts_implementation": "eager", "layer_types": ["sliding_attention", "full_attention"] * 2},
            **{"num_hidden_layers": 4, "eos_token_id": None},
        },
    ),
}


def model_of(context_parallel=None, kind="llama"):
    """A tiny model in fp64; its vocabulary is 50 words."""
    torch.manual_seed(0)
    config_class, model_class, extra = MODELS[kind]
    config = config_class(
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.3,
            **extra,
        }
    )
    model = model_class(config).double()
    return patch_llama(model, num_gist_tokens=3, positions="gist_first", context_parallel=context_parallel)


def contexts(handle, seed, padded=False):
    """Two contexts of several segments and a tail; ids, mask and labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for lengths in ((20, 9, 31, 14, 22, 8), (15, 26, 12, 30, 9, 12)):
        segments = [torch.randint(50, (length,), generator=generator).tolist() for length in lengths]
        rows.append([token for segment in segments[:-1] for token in (*segment, *handle.gist_token_ids)] + segments[-1])
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :17] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :40] = -100  # the first shard has few labels of its own
    return ids, mask, labels


# labeled columns at the end of the context: in the last shard, in several
TAILS = {"short": 5, "long": 70}
KEPT = {"number": 9, "columns": torch.tensor([3, 60, 61, 117, 118])}


def last_labels(labels, count):
    """The labels of the last columns alone."""
    return labels.masked_fill(torch.arange(labels.shape[1]) < labels.shape[1] - count, -100)


def losses_and_gradients(handle, batches):
    """Mean loss of batches in one process, its gradients by name, and the first batch's logits."""
    model = handle.model
    outputs = [model(ids, attention_mask=mask, labels=labels, use_cache=False) for ids, mask, labels in batches]
    loss = torch.stack([output.loss for output in outputs]).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, outputs[0].logits.detach()
