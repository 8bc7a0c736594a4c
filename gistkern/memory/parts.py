"""What a model is made of, from its configuration alone: no weights are read or allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

__all__ = ["Linear", "Parts", "parts_of"]


class Linear(NamedTuple):
    """A linear map inside of a layer: 4-bit loading quantizes it, and LoRA may stand beside it.

    Examples
    --------
    >>> from gistkern.memory import Linear
    >>> Linear("q_proj", outputs=4096, inputs=4096).elements
    16777216
    """

    name: str  # without the path: q_proj
    outputs: int
    inputs: int

    @property
    def elements(self) -> int:
        """Number of elements of the weight, without the bias."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Parts:
    """Widths and tensors of a decoder model.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> from gistkern.memory import parts_of
    >>> shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    >>> parts = parts_of(LlamaConfig(**shape, num_hidden_layers=2))
    >>> parts.layers, parts.keys, parts.windows
    (2, 64, (None, None))
    """

    layers: int
    hidden: int
    heads: int
    queries: int  # width of all query heads
    keys: int  # of all key heads; values are as wide
    inner: int  # of the MLP; of all experts that one token visits
    linears: tuple[Linear, ...]  # of all layers
    embedding: int  # elements of the input embedding
    head: int  # of the output matrix, 0 if it is the embedding
    vocabulary: int
    others: tuple[int, ...]  # elements of all other parameters: norms, biases, experts that are no linear maps
    windows: tuple[int | None, ...]  # per layer: how far it sees, None for all

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return self.embedding + self.head + sum(self.others) + sum(linear.elements for linear in self.linears)


def parts_of(config: Any) -> Parts:
    """The parts of a decoder of transformers, read off the model that it would build.

    Parameters
    ----------
    config : PreTrainedConfig
        Of a causal language model; of a model for images and text its text part is taken.

    Raises
    ------
    ValueError
        If the model has no such attention layers: state-space models, encoders, multi-head latent attention.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    >>> parts_of(LlamaConfig(**shape, num_hidden_layers=2)).parameters
    95040
    """
    config = config.get_text_config(decoder=True)
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{config.model_type} caches latent rows (multi-head latent attention), which are not covered")
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or not getattr(config, "num_hidden_layers", 0):
        raise ValueError(
            f"models of type {config.model_type!r} have no attention layers of one shape to calculate with"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    linears, others, embedding, head = _tensors(config)
    return Parts(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        queries=heads * head_dim,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        inner=_inner(config),
        linears=tuple(linears),
        embedding=embedding,
        head=head,
        vocabulary=config.vocab_size,
        others=tuple(others),
        windows=_windows(config),
    )


def _tensors(config: Any) -> tuple[list[Linear], list[int], int, int]:
    """Linear maps of the layers, other parameters, the input embedding, the output matrix."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears, weights = [], {id(embedding.weight), id(head.weight)}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            linears.append(Linear(path.rpartition(".")[2], module.out_features, module.in_features))
            weights.add(id(module.weight))
    others = [parameter.numel() for parameter in model.parameters() if id(parameter) not in weights]
    tied = head.weight is embedding.weight or config.tie_word_embeddings
    return linears, others, embedding.weight.numel(), 0 if tied else head.weight.numel()


def _inner(config: Any) -> int:
    """Elements that an MLP makes of a token, in each of its stages."""
    visited = getattr(config, "num_experts_per_tok", None)
    if not visited:
        return config.intermediate_size
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return visited * width + (getattr(config, "shared_expert_intermediate_size", None) or 0)


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    kinds = list(kinds) * (config.num_hidden_layers if len(kinds) == 1 else 1)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
