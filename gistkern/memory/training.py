"""Bytes of a training step: weights, gradients, optimizer, activations, logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from gistkern.memory.inference import cache_bytes
from gistkern.memory.parts import Parts
from gistkern.memory.terms import Precision, Saved, optimizer_bytes, trained_tensors, weight_bytes

__all__ = ["OPTIMIZERS", "ROWS", "WEIGHTS", "MemoryEstimate", "TrainingSetup", "estimate"]

WEIGHTS = ("float32", "bfloat16", "nf4")
# optimizer name of transformers -> bits of its state
OPTIMIZERS = {
    "adamw_torch": 32,
    "adamw_torch_fused": 32,
    "adamw_bnb_8bit": 8,
    "paged_adamw_8bit": 8,
    "paged_adamw_32bit": 32,
}


@dataclass(frozen=True)
class TrainingSetup:
    """What the memory of a training step depends on, besides the model; ValueError for settings nobody knows.

    Examples
    --------
    >>> from peft import LoraConfig
    >>> from gistkern.memory import TrainingSetup
    >>> TrainingSetup(tokens=2048, weights="bfloat16", lora=LoraConfig(r=16)).optimizer
    'paged_adamw_8bit'
    """

    tokens: int  # of one sample: context, gist tokens and tail
    batch_size: int = 1  # samples of one forward; accumulating changes nothing: gradients stay allocated in any case
    logit_rows: int | None = None  # rows of a sample whose logits are computed; all of them by default
    num_gist_tokens: int = 10
    compact_rows: int = 11  # of a sample: all its gist tokens and sinks
    weights: str = "nf4"  # 4 bits for the layers' linears
    prepared: bool = True  # fp32 for what is not in 4 bits (prepare_model_for_kbit_training), else bf16
    double_quant: bool = True  # whether NF4's scales are quantized too
    autocast: bool = True  # TrainingArguments(bf16=True)
    lora: Any = None  # a peft.LoraConfig; without one, all parameters are trained
    optimizer: str = "paged_adamw_8bit"
    gradient_checkpointing: bool = True
    teacher: bool = False  # a second forward without gradients gives logits to learn from
    on_cpu: bool = False  # dropout keeps a byte per element on a GPU, and a float on a CPU

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"unknown weights {self.weights!r}: expected one of {', '.join(WEIGHTS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        if self.weights == "nf4" and self.lora is None:
            raise ValueError("4-bit weights cannot be trained: pass lora")


class MemoryEstimate(NamedTuple):
    """Bytes of one training step, by what they are for; `total` is the step's peak.

    `logits` and `working` are not needed at the same time, so the larger one counts. `paged` bytes of `optimizer` move
    to the host when the card is full, and back for every step.

    Examples
    --------
    >>> from gistkern.memory import MemoryEstimate
    >>> step = MemoryEstimate(weights=16, trainable=1, gradients=1, optimizer=2, activations=5, logits=3, working=1,
    ...                       paged=0, kv_gist=1, kv_full=9, trainable_parameters=1)
    >>> step.resident, step.total
    (20, 28)
    """

    weights: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    paged: int
    kv_gist: int
    kv_full: int
    trainable_parameters: int

    @property
    def resident(self) -> int:
        """Bytes that stay allocated between steps."""
        return self.weights + self.trainable + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Peak of a step, in bytes."""
        return self.resident + self.activations + max(self.logits, self.working)

    def fits(self, card: int, reserve: int = 10**9, paging: bool = False) -> bool:
        """Whether a step fits `card` bytes, of which `reserve` are kept for the driver, the allocator and fragments.

        With `paging` the optimizer's paged states may be on the host until its step, when activations are gone.
        """
        peak = max(self.total - self.paged, self.resident) if paging else self.total
        return peak + reserve <= card


# what a table of them says
ROWS = {
    "weights": "base weights, and the originals of matrices that are trained as copies",
    "trainable": "trained weights: LoRA, gist rows, copies of whole matrices",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations kept for the backward pass",
    "logits": "logits, log-probabilities, their gradients",
    "working": "one layer's backward pass",
    "total": "**peak of a training step** (the larger of the last two counts)",
    "kv_gist": "KV cache of one compressed context, bf16",
    "kv_full": "the same context's full KV cache, bf16",
}


def estimate(parts: Parts, setup: TrainingSetup) -> MemoryEstimate:
    """Bytes of one training step of the model that `gistkern.memory.parts_of` describes.

    The layer is taken for Llama's: gate, activation and factor in the MLP, RMSNorm twice. Not in it: the driver's own
    memory, fragments, and the temporaries of optimizers that are not fused.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> from gistkern.memory import TrainingSetup, estimate, parts_of
    >>> shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    >>> parts = parts_of(LlamaConfig(**shape, num_hidden_layers=2))
    >>> step = estimate(parts, TrainingSetup(tokens=512, weights="float32", optimizer="adamw_torch_fused"))
    >>> step.gradients == 4 * step.trainable_parameters, step.fits(24 * 10**9)
    (True, True)
    """
    precision = Precision(setup.weights, setup.autocast, setup.prepared)
    gists = setup.num_gist_tokens
    trained = trained_tensors(parts, precision, setup.lora, gists)
    rows, compact_rows = setup.batch_size * setup.tokens, setup.batch_size * setup.compact_rows
    saved = Saved(parts, precision, setup.lora, rows, compact_rows, 4 if setup.on_cpu else 1)
    layer = saved.hidden if setup.gradient_checkpointing else saved.layer
    trainable = sum(one.elements * one.element for one in trained)
    original_rows = gists * parts.hidden * precision.base
    return MemoryEstimate(
        weights=0 if setup.lora is None else weight_bytes(parts, precision, setup.double_quant) + original_rows,
        trainable=trainable,
        gradients=trainable,
        optimizer=optimizer_bytes(trained, OPTIMIZERS[setup.optimizer]),
        activations=parts.layers * layer,
        logits=_head(parts, setup, saved),
        working=_working(parts, setup, saved),
        paged=setup.optimizer.startswith("paged_")
        * optimizer_bytes(trained, OPTIMIZERS[setup.optimizer], paged_only=True),
        kv_gist=cache_bytes(parts, setup.compact_rows),
        kv_full=cache_bytes(parts, setup.tokens),
        trainable_parameters=sum(one.elements for one in trained),
    )


def _head(parts: Parts, setup: TrainingSetup, saved: Saved) -> int:
    """Last norm, output matrix, log-softmax: what they keep, and gradients in flight."""
    rows = setup.tokens if setup.logit_rows is None else setup.logit_rows
    logits, matrix = setup.batch_size * rows * parts.vocabulary, parts.embedding
    kept = saved.norm + saved.hidden
    if setup.autocast and saved.precision.base == 4:
        kept += matrix * 2  # autocast's copy of the output matrix
    softmax = logits * 3 * 4  # itself and two gradients
    if setup.teacher:
        softmax += logits * 2 * 4  # its logits and probabilities
    if setup.lora is not None and "lm_head" not in setup.lora.modules_to_save:
        return kept + softmax
    # the matrix's input, and its gradient: computed whole, in bf16 first under autocast, before it is added to what is
    # there; by then the softmax is gone, and its gradient is there in fp32 and in what the matrix multiplies
    gradient = matrix * (6 if setup.autocast else saved.precision.base)
    return kept + saved.hidden + max(softmax, logits * (6 if setup.autocast else 4) + gradient)


def _working(parts: Parts, setup: TrainingSetup, saved: Saved) -> int:
    """Gradients in flight in a layer's MLP, and what is computed again for it."""
    largest = max(linear.elements for linear in parts.linears)
    needed = 3 * saved.inner + 3 * saved.norm_input
    if setup.weights == "nf4":
        needed += 2 * largest  # one matrix at a time, without its quantization
    if setup.lora is None:
        needed += largest * saved.precision.base
    return needed + (saved.layer if setup.gradient_checkpointing else 0)
