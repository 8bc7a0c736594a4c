"""Layouts and heads that the benchmarks and the work counter use, in one place."""

import itertools

from gistkern import GistLayout

# raw tokens per segment, gist tokens per segment
SEGMENTS = {
    "64/4": (64, 4),
    "256/16": (256, 16),
    "256/64": (256, 64),
    "512/8": (512, 8),
    "1024/128": (1024, 128),
    "one segment": None,
}
LAYOUTS = (*SEGMENTS, "hierarchical", "sliding", "packed")
# query heads, key/value heads, head_dim
HEADS = {"Llama-3-8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64), "2 heads, D 64": (2, 2, 64)}


# shapes as published with the models; fewer layers where all of them would take hours on a CPU
_SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "tie_word_embeddings": True}
_SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3}
_TINY = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
_LLAMA = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "tie_word_embeddings": True}
_LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8}
MODELS = {
    "SmolLM2-135M": _SMOLLM2 | {"num_hidden_layers": 30},
    "SmolLM2-135M, 4 of 30 layers": _SMOLLM2 | {"num_hidden_layers": 4},
    "Llama-3-8B, 2 of 32 layers": _LLAMA | {"num_hidden_layers": 2},
    "Llama-3-8B, 8 of 32 layers": _LLAMA | {"num_hidden_layers": 8},
    "Llama-3-8B": _LLAMA | {"num_hidden_layers": 32, "tie_word_embeddings": False},
    "tiny": _TINY | {"num_attention_heads": 4, "num_key_value_heads": 2},
}

# raw tokens of the documents of a packed batch, over and over: ragged, as a training set is
PACKED = (700, 150, 1900, 420, 60, 1100)


def layout_of(name: str, rows: int) -> GistLayout:
    """`rows` tokens in segments of raw tokens / gists, the rest as the open tail."""
    if name == "packed":
        return _packed(rows)
    if name == "hierarchical":
        count = (rows - 32) // (256 + 8)
        return GistLayout.hierarchical([256] * count, 8, 10, tail=rows - count * (256 + 8) - 10)
    if name == "sliding":
        stride = 64
        raw = rows * stride // (stride + 1)
        return GistLayout.sliding(raw, 512, stride)
    sizes = SEGMENTS[name]
    if sizes is None:
        return GistLayout.from_segments([], 1, tail=rows)
    raw, gists = sizes
    count = rows // (raw + gists)
    return GistLayout.from_segments([raw] * count, gists, tail=rows - count * (raw + gists))


def _packed(rows: int) -> GistLayout:
    """Documents in segments of 256/16, the last segment of each shorter; what is left over is one more tail."""
    documents, left = [], rows
    for length in itertools.cycle(PACKED):
        segments = [256] * (length // 256) + [length % 256]
        size = length + 16 * len(segments)
        if size > left:
            break
        documents.append(GistLayout.from_segments(segments, 16))
        left -= size
    if left:
        documents.append(GistLayout.from_segments([], 1, tail=left))
    return GistLayout.pack(documents)
