"""The terms of training_memory.py: which tensors a training step has, and which of them autograd keeps.

Read off the operations of transformers' Llama layers, peft's LoRA layers, bitsandbytes' 4-bit linear and
gistkern's attention; tests/bench/test_training_memory.py compares each with what torch really keeps.
"""

from collections.abc import Iterable
from math import ceil
from typing import Any, NamedTuple

# bitsandbytes: weights per block of 4-bit weights, blocks per block of their own 8-bit scales, entries per block of
# 8-bit optimizer state, and the elements from which a tensor's state is in 8 bits, and is paged
_BLOCK, _NESTED_BLOCK, _STATE_BLOCK, _LEAST_8BIT, _LEAST_PAGED = 64, 256, 256, 4096, 100_000


class Trained(NamedTuple):
    """A trained tensor: elements, bytes of an element, and whether it is the weight of an `nn.Embedding`."""

    elements: int
    element: int
    embedding: bool = False


class Precision:
    """Bytes of an element by where it is, for base weights of one kind, with or without bf16 autocast."""

    def __init__(self, weights: str, autocast: bool) -> None:
        self.weights, self.autocast = weights, autocast
        # parameters that are not quantized, and hidden states between layers; what a linear multiplies; what it returns
        self.base = 2 if weights == "bfloat16" else 4
        self.product = 2 if autocast or weights == "bfloat16" else 4
        self.linear = self.base if weights == "nf4" else self.product  # the 4-bit one returns the dtype it was given


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear of a layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def base_bytes(config: Any, precision: Precision, double_quant: bool) -> int:
    """The model's own weights."""
    vocabulary = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    layer = 0
    for outputs, inputs in linear_shapes(config).values():
        elements = outputs * inputs
        layer += _nf4_bytes(elements, double_quant) if precision.weights == "nf4" else elements * precision.base
    return (vocabulary + norms) * precision.base + config.num_hidden_layers * layer


def _nf4_bytes(elements: int, double_quant: bool) -> int:
    """Half a byte each, and scales (QLoRA, Dettmers et al. 2023, section 3)."""
    blocks = ceil(elements / _BLOCK)
    code = 16 * 4
    if not double_quant:
        return ceil(elements / 2) + 4 * blocks + code
    nested_code, offset = 256 * 4, 4
    return ceil(elements / 2) + blocks + 4 * ceil(blocks / _NESTED_BLOCK) + code + nested_code + offset


def trained_tensors(config: Any, precision: Precision, lora: Any, gists: int) -> list[Trained]:
    """Every tensor with a gradient; without LoRA that is all of them."""
    base, hidden, shapes = precision.base, config.hidden_size, linear_shapes(config)
    whole = {
        "gist_embeddings": Trained(gists * hidden, base),
        "embed_tokens": Trained(config.vocab_size * hidden, base, embedding=True),
    }
    if not config.tie_word_embeddings:
        whole["lm_head"] = Trained(config.vocab_size * hidden, base)
    if lora is None:
        layer = [Trained(outputs * inputs, base) for outputs, inputs in shapes.values()]
        norms = [Trained(hidden, base)] * (2 * config.num_hidden_layers + 1)
        return [*whole.values(), *norms, *layer * config.num_hidden_layers]
    unknown = [name for name in lora.target_modules if name not in shapes]
    unknown += [name for name in lora.modules_to_save if name not in whole]
    if unknown:
        raise ValueError(
            f"cannot calculate with the trained modules {', '.join(unknown)}: LoRA is known on {', '.join(shapes)}, "
            f"whole matrices are {', '.join(whole)}"
        )
    # peft makes LoRA matrices fp32 whatever the base is, and whole matrices keep the base's dtype
    layer = [Trained(lora.r * side, 4) for name in lora.target_modules for side in shapes[name]]
    return [whole[name] for name in lora.modules_to_save] + layer * config.num_hidden_layers


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


class Saved:
    """Bytes that autograd keeps of a forward pass over `rows` rows (of all samples) and `compact_rows` gist rows.

    `mask_element` is what dropout keeps per element: 1 byte on a GPU, a float on a CPU.
    """

    def __init__(
        self, config: Any, precision: Precision, lora: Any, rows: int, compact_rows: int, mask_element: int
    ) -> None:
        self.precision, self.lora, self.rows, self.mask_element = precision, lora, rows, mask_element
        self.shapes = linear_shapes(config)
        queries, keys = self.shapes["q_proj"][0], self.shapes["k_proj"][0]
        # of hidden states, all that a checkpointed layer keeps; in fp32, in which norms compute; of the MLP's width
        self.hidden = rows * config.hidden_size * precision.base
        self.norm_input = rows * config.hidden_size * 4
        self.inner = rows * config.intermediate_size * precision.linear
        # an RMSNorm: its input and a factor per row; also the normed rows if its weight trains
        self.norm = self.norm_input + rows * 4 + (self.hidden if lora is None else 0)
        # q, k, v, out, log-sum-exp and the compact rows: nothing is N x N
        elements = rows * (2 * queries + 2 * keys) + compact_rows * 2 * keys
        attention = elements * precision.linear + rows * config.num_attention_heads * 4
        inputs = (
            self._inputs(("q_proj", "k_proj", "v_proj"), precision.base)
            + self._inputs(("o_proj",), precision.linear)
            + self._inputs(("gate_proj", "up_proj"), precision.base)
            + self._inputs(("down_proj",), precision.linear)
        )
        # a decoder layer; of the MLP the gate, its activation and the factor beside it are kept
        self.layer = 2 * self.norm + attention + 3 * self.inner + inputs + self._weight_copies()

    def _inputs(self, group: tuple[str, ...], source: int) -> int:
        """What the trained ones of a group of linears keep of the input they share, of `source` bytes an element."""
        width = self.rows * self.shapes[group[0]][1]
        if self.lora is None:
            product = self.precision.product
            return width * product * (1 if source == product else len(group))  # a cast makes a tensor for each
        targets = sum(name in self.lora.target_modules for name in group)
        product = 2 if self.precision.autocast else 4  # LoRA matrices are fp32
        low_rank = targets * self.rows * self.lora.r * product
        if self.lora.lora_dropout:
            return low_rank + targets * width * (product + self.mask_element)
        return low_rank + width * product * (min(targets, 1) if source == product else targets)

    def _weight_copies(self) -> int:
        """Autocast's bf16 copies of a layer's fp32 weights."""
        if not self.precision.autocast:
            return 0
        total = 0
        for name, (outputs, inputs) in self.shapes.items():
            if self.precision.weights == "float32":
                total += outputs * inputs
            if self.lora is not None and name in self.lora.target_modules:
                total += self.lora.r * (outputs + inputs)
        return 2 * total
