"""The model around the op, calculated: weights, caches, what fits on a card, limits of decoding (see roofline.py).

A decoding step reads every weight but the input embedding once, and every sequence's cached rows once.
"""

from math import ceil
from typing import NamedTuple

from transformers import LlamaConfig

from bench.shapes import MODELS
from gistkern.kernels.chips import Gpu
from gistkern.memory import Precision, parts_of, weight_bytes

# question and answer so far, as in gistkern/memory; gist rows of a context; tokens of a context
TAIL, GIST_ROWS, CONTEXTS = 32, 10, (6096, 131072)
# kept for the driver, the allocator and fragments, as in gistkern/memory
RESERVE = 10**9
WEIGHTS = ("bf16", "NF4, rest bf16", "NF4, rest fp32")


LLAMA_3_8B = LlamaConfig(**MODELS["Llama-3-8B"])
PARTS = parts_of(LLAMA_3_8B)


class Weights(NamedTuple):
    """Bytes of the weights in memory, and of those that a decoding step reads."""

    resident: int
    read: int


# cached contexts by name, and their rows; in segments, a last, shorter one has its gists all the same
DOCUMENTS = {
    "6,096 tokens": 6096,
    "10 gist rows": 10,
    "128 gist rows": 128,
    "6,096 in 512/8": ceil(6096 / 512) * 8,
    "131,072 tokens": 131072,
    "131,072 in 512/8": ceil(131072 / 512) * 8,
}


def parameters() -> int:
    """All of them."""
    return PARTS.parameters


def multiplied() -> int:
    """Parameters that a step multiplies with: all but the input embedding, of which it looks up rows."""
    return parameters() - LLAMA_3_8B.vocab_size * LLAMA_3_8B.hidden_size


def kv_row() -> int:
    """Bytes of one cached row: keys and values of all layers in bf16."""
    return 2 * LLAMA_3_8B.num_hidden_layers * LLAMA_3_8B.num_key_value_heads * LLAMA_3_8B.head_dim * 2


def weights_of(kind: str) -> Weights:
    """Weights in one of the formats `WEIGHTS`.

    NF4 with double quantization is that of gistkern/memory: the layers' linears have 4 bits, the vocabulary
    matrices and norms do not. They are fp32 after `prepare_model_for_kbit_training`, and bf16 if the model is only
    loaded in 4 bits.
    """
    embedding = LLAMA_3_8B.vocab_size * LLAMA_3_8B.hidden_size
    if kind == "bf16":
        resident = weight_bytes(PARTS, Precision("bfloat16", autocast=False))
        return Weights(resident, resident - 2 * embedding)
    resident = weight_bytes(PARTS, Precision("nf4", autocast=True))
    if kind == "NF4, rest fp32":
        return Weights(resident, resident - 4 * embedding)
    if kind != "NF4, rest bf16":
        raise ValueError(f"unknown weights {kind!r}: expected one of {', '.join(WEIGHTS)}")
    norms = (2 * LLAMA_3_8B.num_hidden_layers + 1) * LLAMA_3_8B.hidden_size
    resident -= 2 * (2 * embedding + norms)
    return Weights(resident, resident - 2 * embedding)


def left_for_caches(gpu: Gpu, kind: str) -> int:
    """Bytes beside the weights and the reserve; 0 if the weights do not fit."""
    return max(0, gpu.memory - RESERVE - weights_of(kind).resident)


def largest_batch(gpu: Gpu, kind: str, rows: int) -> int:
    """Sequences (or documents) of so many cached rows that fit beside the weights."""
    return left_for_caches(gpu, kind) // (rows * kv_row())


def attention_flops(rows: int) -> int:
    """FLOPs of all layers' attention over so many rows, for one token."""
    return 4 * LLAMA_3_8B.head_dim * LLAMA_3_8B.num_attention_heads * LLAMA_3_8B.num_hidden_layers * rows


def tokens_per_second(gpu: Gpu, kind: str, batch: int, rows: int) -> float:
    """Upper bound for the batch: bytes at full bandwidth or FLOPs at peak, whichever takes longer."""
    moved = weights_of(kind).read + batch * rows * kv_row()
    flops = batch * (2 * multiplied() + attention_flops(rows))
    return batch / max(moved / gpu.bandwidth, flops / gpu.flops)


def rows_seen() -> list[int]:
    """Rows that a decoding step reads per sequence: gist rows and tail, or a whole context and the same tail."""
    return [GIST_ROWS + TAIL, *(tokens + TAIL for tokens in CONTEXTS)]


def kv_share(kind: str, batch: int, rows: int) -> float:
    """Of the bytes that a step reads, those of keys and values."""
    read = batch * rows * kv_row()
    return read / (weights_of(kind).read + read)


def kv_share_of_memory(kind: str, rows: int) -> float:
    """Of the bytes of weights and one sequence's cache."""
    return rows * kv_row() / (rows * kv_row() + weights_of(kind).resident)
