"""The terms of a training step's memory: which tensors it has, and which of them autograd keeps.

Read off the operations of transformers' Llama layers, peft's LoRA layers, bitsandbytes' 4-bit linear and
gistkern's attention; tests/memory/ compares each with what torch really keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any, NamedTuple

from gistkern.memory.parts import Parts

__all__ = ["Precision", "Saved", "Trained", "optimizer_bytes", "trained_tensors", "weight_bytes"]

# bitsandbytes: weights per block of 4-bit weights, blocks per block of their own 8-bit scales, entries per block of
# 8-bit optimizer state, and the elements from which a tensor's state is in 8 bits, and is paged
_BLOCK, _NESTED_BLOCK, _STATE_BLOCK, _LEAST_8BIT, _LEAST_PAGED = 64, 256, 256, 4096, 100_000


class Trained(NamedTuple):
    """A trained tensor: elements, bytes of an element, and whether it is the weight of an `nn.Embedding`."""

    elements: int
    element: int
    embedding: bool = False


class Precision:
    """Bytes per element of weights and activations, for base weights of one kind, with or without bf16 autocast.

    `prepared` says whether `prepare_model_for_kbit_training` made fp32 of what 4-bit loading leaves in bf16.

    Examples
    --------
    >>> from gistkern.memory import Precision
    >>> Precision("float32", autocast=True).base, Precision("bfloat16", autocast=True).base
    (4, 2)
    """

    def __init__(self, weights: str, autocast: bool, prepared: bool = True) -> None:
        self.weights, self.autocast = weights, autocast
        # parameters that are not quantized, and hidden states between layers; what a linear multiplies; what it returns
        self.base = 2 if weights == "bfloat16" or (weights == "nf4" and not prepared) else 4
        self.product = 2 if autocast or weights == "bfloat16" else 4
        self.linear = self.base if weights == "nf4" else self.product  # the 4-bit one returns the dtype it was given


def weight_bytes(parts: Parts, precision: Precision, double_quant: bool = True) -> int:
    """Bytes of the model's own weights.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> from gistkern.memory import Precision, parts_of, weight_bytes
    >>> shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    >>> parts = parts_of(LlamaConfig(**shape, num_hidden_layers=2))
    >>> weight_bytes(parts, Precision("bfloat16", autocast=False))
    190080
    """
    rest = parts.embedding + parts.head + sum(parts.others)
    if precision.weights == "nf4":
        return rest * precision.base + sum(_nf4_bytes(linear.elements, double_quant) for linear in parts.linears)
    return parts.parameters * precision.base


def _nf4_bytes(elements: int, double_quant: bool) -> int:
    """Half a byte each, and scales (QLoRA, Dettmers et al. 2023, section 3)."""
    blocks = ceil(elements / _BLOCK)
    code = 16 * 4
    if not double_quant:
        return ceil(elements / 2) + 4 * blocks + code
    nested_code, offset = 256 * 4, 4
    return ceil(elements / 2) + blocks + 4 * ceil(blocks / _NESTED_BLOCK) + code + nested_code + offset


def trained_tensors(parts: Parts, precision: Precision, lora: Any, gists: int) -> list[Trained]:
    """Every tensor with a gradient; without LoRA that is all of them."""
    base = precision.base
    whole = {
        "gist_embeddings": Trained(gists * parts.hidden, base),
        "embed_tokens": Trained(parts.embedding, base, embedding=True),
    }
    if parts.head:
        whole["lm_head"] = Trained(parts.head, base)
    if lora is None:
        rest = [*parts.others, *(linear.elements for linear in parts.linears)]
        return [*whole.values(), *(Trained(elements, base) for elements in rest)]
    names = sorted({linear.name for linear in parts.linears})
    unknown = [name for name in lora.target_modules if name not in names]
    unknown += [name for name in lora.modules_to_save if name not in whole]
    if unknown:
        raise ValueError(
            f"cannot calculate with the trained modules {', '.join(unknown)}: LoRA is known on {', '.join(names)}, "
            f"whole matrices are {', '.join(whole)}"
        )
    # peft makes LoRA matrices fp32 whatever the base is, and whole matrices keep the base's dtype
    targets = [linear for linear in parts.linears if linear.name in lora.target_modules]
    added = [Trained(lora.r * side, 4) for linear in targets for side in (linear.outputs, linear.inputs)]
    return [whole[name] for name in lora.modules_to_save] + added


def optimizer_bytes(trained: Iterable[Trained], bits: int, paged_only: bool = False) -> int:
    """State of AdamW, or the part of it that a paged optimizer can move to the host.

    At 8 bits small tensors keep fp32, and embeddings do (transformers' Trainer sees to that).
    """
    total = 0
    for one in trained:
        if paged_only and one.elements < _LEAST_PAGED:
            continue
        if bits == 32:
            total += 2 * one.elements * one.element
        elif one.elements < _LEAST_8BIT or one.embedding:
            total += 2 * one.elements * 4
        else:
            total += 2 * one.elements
            total += 0 if paged_only else 2 * ceil(one.elements / _STATE_BLOCK) * 4
    return total


# the linear maps that read the same tensor, by the names that families give them
_READ_HIDDEN = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_READ_ATTENTION = ("o_proj",)
_READ_HIDDEN_AGAIN = ("gate_proj", "up_proj", "gate_up_proj", "c_fc")
_READ_INNER = ("down_proj", "c_proj")


class Saved:
    """Bytes that autograd keeps of a forward pass over `rows` rows (of all samples) and `compact_rows` gist rows.

    `mask_element` is what dropout keeps per element: 1 byte on a GPU, a float on a CPU.
    """

    def __init__(
        self, parts: Parts, precision: Precision, lora: Any, rows: int, compact_rows: int, mask_element: int
    ) -> None:
        self.parts, self.precision, self.lora = parts, precision, lora
        self.rows, self.mask_element = rows, mask_element
        # of hidden states, all that a checkpointed layer keeps; in fp32, in which norms compute; of the MLP's width
        self.hidden = rows * parts.hidden * precision.base
        self.norm_input = rows * parts.hidden * 4
        self.inner = rows * parts.inner * precision.linear
        # an RMSNorm: its input and a factor per row; also the normed rows if its weight trains
        self.norm = self.norm_input + rows * 4 + (self.hidden if lora is None else 0)
        # q, k, v, out, log-sum-exp and the compact rows: nothing is N x N
        elements = rows * (2 * parts.queries + 2 * parts.keys) + compact_rows * 2 * parts.keys
        attention = elements * precision.linear + rows * parts.heads * 4
        inputs = (
            self._inputs(_READ_HIDDEN, parts.hidden, precision.base)
            + self._inputs(_READ_ATTENTION, parts.queries, precision.linear)
            + self._inputs(_READ_HIDDEN_AGAIN, parts.hidden, precision.base)
            + self._inputs(_READ_INNER, parts.inner, precision.linear)
        )
        # a decoder layer; of the MLP the gate, its activation and the factor beside it are kept
        self.layer = 2 * self.norm + attention + 3 * self.inner + inputs + self._weight_copies()

    def _inputs(self, names: tuple[str, ...], width: int, source: int) -> int:
        """What the trained ones of some linears keep of the input they share, of `source` bytes an element."""
        group = {linear.name for linear in self.parts.linears} & set(names)
        kept = self.rows * width
        if self.lora is None:
            product = self.precision.product
            # a cast makes a tensor for each; experts are no linear maps, and keep their input once
            return kept * product * (1 if source == product else max(len(group), 1))
        targets = len(group & set(self.lora.target_modules))
        product = 2 if self.precision.autocast else 4  # LoRA matrices are fp32
        low_rank = targets * self.rows * self.lora.r * product
        if self.lora.lora_dropout:
            return low_rank + targets * kept * (product + self.mask_element)
        return low_rank + kept * product * (min(targets, 1) if source == product else targets)

    def _weight_copies(self) -> int:
        """Autocast's bf16 copies of a layer's fp32 weights."""
        if not self.precision.autocast:
            return 0
        total = 0
        for linear in self.parts.linears:
            if self.precision.weights == "float32":
                total += linear.elements
            if self.lora is not None and linear.name in self.lora.target_modules:
                total += self.lora.r * (linear.outputs + linear.inputs)
        return 2 * total // self.parts.layers
