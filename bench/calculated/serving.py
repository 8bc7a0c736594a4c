"""The model around the op, calculated: weights, caches, what fits on a card, limits of decoding (see roofline.py).

A decoding step reads every weight but the input embedding once, and every sequence's cached rows once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from bench.calculated.memory_terms import Precision, base_bytes
from gistkern.kernels.chips import GPUS, Gpu

__all__ = [
    "BATCHES",
    "CONTEXTS",
    "DOCUMENTS",
    "GIST_ROWS",
    "LLAMA_3_8B",
    "RESERVE",
    "TAIL",
    "WEIGHTS",
    "Document",
    "Llama",
    "Weights",
    "attention_flops",
    "crossover",
    "kv_row",
    "largest_batch",
    "left_for_caches",
    "multiplied",
    "parameters",
    "report",
    "rows_seen",
    "tokens_per_second",
    "weights_of",
]

# question and answer so far, as in training_memory.py; gist rows of a context; tokens of a context
TAIL, GIST_ROWS, CONTEXTS = 32, 10, (6096, 131072)
# kept for the driver, the allocator and fragments, as in training_memory.py
RESERVE = 10**9
BATCHES = (1, 4, 16, 64, 256, 1024)
WEIGHTS = ("bf16", "NF4, rest bf16", "NF4, rest fp32")


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama, by the names that transformers' config has; Llama-3-8B by default."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    tie_word_embeddings: bool = False


LLAMA_3_8B = Llama()


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights in memory, and of those that a decoding step reads."""

    resident: int
    read: int


@dataclass(frozen=True)
class Document:
    """A cached context: its name, its rows, and how they are counted."""

    name: str
    rows: int
    count: str


def _in_segments(tokens: int, raw: int, gists: int) -> Document:
    segments = ceil(tokens / raw)  # the last may be shorter, and has its gists all the same
    name = f"{tokens:,} tokens in segments of {raw}/{gists}"
    return Document(name, segments * gists, f"ceil({tokens:,} / {raw}) x {gists} = {segments} x {gists} = ")


DOCUMENTS = (
    Document("6,096 tokens, uncompressed", 6096, ""),
    Document("10 gist rows", 10, ""),
    Document("128 gist rows", 128, ""),
    _in_segments(6096, 512, 8),
    Document("131,072 tokens, uncompressed", 131072, ""),
    _in_segments(131072, 512, 8),
)


def parameters(model: Llama = LLAMA_3_8B) -> int:
    """All of them."""
    return base_bytes(model, Precision("bfloat16", autocast=False), double_quant=False) // 2


def multiplied(model: Llama = LLAMA_3_8B) -> int:
    """Parameters that a step multiplies with: all but the input embedding, of which it looks up rows."""
    return parameters(model) - model.vocab_size * model.hidden_size


def kv_row(model: Llama = LLAMA_3_8B) -> int:
    """Bytes of one cached row: keys and values of all layers in bf16."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * 2


def weights_of(kind: str, model: Llama = LLAMA_3_8B) -> Weights:
    """Weights in one of the formats `WEIGHTS`.

    NF4 with double quantisation is that of training_memory.py: the layers' linears have 4 bits, the vocabulary
    matrices and norms do not. They are fp32 after `prepare_model_for_kbit_training`, and bf16 if the model is only
    loaded in 4 bits.
    """
    embedding = model.vocab_size * model.hidden_size
    if kind == "bf16":
        resident = base_bytes(model, Precision("bfloat16", autocast=False), double_quant=False)
        return Weights(resident, resident - 2 * embedding)
    resident = base_bytes(model, Precision("nf4", autocast=True), double_quant=True)
    if kind == "NF4, rest fp32":
        return Weights(resident, resident - 4 * embedding)
    if kind != "NF4, rest bf16":
        raise ValueError(f"unknown weights {kind!r}: expected one of {', '.join(WEIGHTS)}")
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    resident -= 2 * (2 * embedding + norms)
    return Weights(resident, resident - 2 * embedding)


def left_for_caches(gpu: Gpu, kind: str) -> int:
    """Bytes beside the weights and the reserve; 0 if the weights do not fit."""
    return max(0, gpu.memory - RESERVE - weights_of(kind).resident)


def largest_batch(gpu: Gpu, kind: str, rows: int) -> int:
    """Sequences (or documents) of so many cached rows that fit beside the weights."""
    return left_for_caches(gpu, kind) // (rows * kv_row())


def crossover(gpu: Gpu, kind: str, batch: int) -> int:
    """The smallest number of rows per sequence from which KV takes longer than the weights' part of a step.

    The weights' part is the longer of reading them and multiplying with them; the second grows with the batch. Exact:
    integers only.
    """
    read, arithmetic = weights_of(kind).read * gpu.flops, 2 * multiplied() * batch * gpu.bandwidth
    return max(read, arithmetic) // (batch * kv_row() * gpu.flops) + 1


def attention_flops(rows: int, model: Llama = LLAMA_3_8B) -> int:
    """FLOPs of all layers' attention over so many rows, for one token."""
    return 4 * model.head_dim * model.num_attention_heads * model.num_hidden_layers * rows


def tokens_per_second(gpu: Gpu, kind: str, batch: int, rows: int, model: Llama = LLAMA_3_8B) -> float:
    """Upper bound for the batch: bytes at full bandwidth or FLOPs at peak, whichever takes longer."""
    moved = weights_of(kind, model).read + batch * rows * kv_row(model)
    flops = batch * (2 * multiplied(model) + attention_flops(rows, model))
    return batch / max(moved / gpu.bandwidth, flops / gpu.flops)


def rows_seen() -> list[int]:
    """Rows that a decoding step reads per sequence: gist rows and tail, or a whole context and the same tail."""
    return [GIST_ROWS + TAIL, *(tokens + TAIL for tokens in CONTEXTS)]


def report() -> dict[str, Any]:
    """Weights, shares of KV, crossovers, documents and throughput."""
    row, rows_of = kv_row(), rows_seen()
    reads = {kind: weights_of(kind).read for kind in WEIGHTS}
    shares = [
        {"weights": kind, "batch": batch, "rows": rows, "share": batch * rows * row / (read + batch * rows * row)}
        for kind, read in reads.items()
        for batch in BATCHES
        for rows in rows_of
    ]
    by_card: dict[str, list[dict[str, Any]]] = {"crossover": [], "documents": [], "throughput": []}
    for gpu in GPUS:
        for kind in WEIGHTS:
            of = {"gpu": gpu.name, "weights": kind}
            left = left_for_caches(gpu, kind)
            by_card["crossover"] += [
                of | {"batch": batch, "rows": crossover(gpu, kind, batch), "fits": left // (batch * row)}
                for batch in BATCHES
            ]
            by_card["documents"] += [
                of | {"document": each.name, "rows": each.rows, "left": left, "fit": left // (each.rows * row)}
                for each in DOCUMENTS
            ]
            by_card["throughput"] += [_throughput(gpu, kind, rows) for rows in rows_of]
    return {
        "model": {"parameters": parameters(), "multiplied": multiplied(), "kv_row": row, "reserve": RESERVE},
        "weights": {kind: asdict(weights_of(kind)) for kind in WEIGHTS},
        "share_of_memory": [
            {"weights": kind, "tokens": tokens, "share": tokens * row / (tokens * row + weights_of(kind).resident)}
            for kind in WEIGHTS
            for tokens in (CONTEXTS[0], 6144)
        ],
        "shares": shares,
        **by_card,
    }


def _throughput(gpu: Gpu, kind: str, rows: int) -> dict[str, Any]:
    most = largest_batch(gpu, kind, rows)
    batches = [batch for batch in BATCHES if batch <= most]
    return {
        "gpu": gpu.name,
        "weights": kind,
        "rows": rows,
        "largest_batch": most,
        "largest_tokens_per_second": tokens_per_second(gpu, kind, most, rows) if most else 0.0,
        "tokens_per_second": {str(batch): tokens_per_second(gpu, kind, batch, rows) for batch in batches},
    }
