"""What a card has to hold: one answer for reading a context and training on it, of a model's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from types import SimpleNamespace
from typing import Any

from gistkern.cache.call_size import call_tokens
from gistkern.memory.inference import cache_bytes, gist_rows, reading_bytes, tokens_per_call
from gistkern.memory.parts import parts_of
from gistkern.memory.terms import Precision, weight_bytes
from gistkern.memory.training import MemoryEstimate, TrainingSetup, estimate

__all__ = ["CARDS", "RESERVE", "Needs", "Plan", "needs"]

CARDS = (24, 40, 48, 80, 141)  # GB, 10^9 bytes
RESERVE = 10**9  # kept for the driver, the allocator, fragments and a library's workspace


@dataclass(frozen=True)
class Plan:
    """What `needs` is asked about: contexts of `tokens` tokens, and how they are compressed and trained on.

    Examples
    --------
    >>> from gistkern.memory import Plan
    >>> Plan(tokens=8000, gists=10, segment_length=512, four_bit=True).batch
    1
    """

    tokens: int
    gists: int = 10
    segment_length: int | None = None
    four_bit: bool = False
    batch: int = 1
    lora: int = 16  # rank, on all linear maps of the layers; 0 trains all weights
    tail: int = 64  # tokens of question and answer, whose logits are computed
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool | None = None  # None: with 4-bit weights, as `gistkern train` does it


@dataclass(frozen=True)
class Needs:
    """What `needs` found: bytes of weights, caches and peaks, in bfloat16 unless said otherwise.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> from gistkern.memory import Plan, needs
    >>> shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    >>> found = needs(LlamaConfig(**shape, num_hidden_layers=2), Plan(tokens=1000))
    >>> found.fits(24)
    {'plain prefill': True, 'compress': True}
    """

    parameters: int
    weights: int
    full_cache: int  # of one context
    gist_cache: int
    gist_rows: int
    prefill_peak: int  # weights, the full cache and the pass that fills it
    compress_peak: int  # weights, the gist cache and the largest call
    training: MemoryEstimate | None = field(default=None)

    @property
    def peaks(self) -> dict[str, int]:
        """Peak bytes of a plain prefill, of `compress` and of a training step, without the reserve."""
        found = {"plain prefill": self.prefill_peak, "compress": self.compress_peak}
        return found | ({"training step": self.training.total} if self.training else {})

    def fits(self, card: int) -> dict[str, bool]:
        """Whether each of `peaks` and the reserve fit a card of so many GB."""
        return {name: peak + RESERVE <= card * 10**9 for name, peak in self.peaks.items()}


def needs(config: Any, plan: Plan, training: bool = False) -> Needs:
    """Bytes of memory that a plan takes with the model of a transformers configuration.

    Parameters
    ----------
    config : PreTrainedConfig
        Of a decoder (`gistkern.memory.parts_of`).
    plan : Plan
    training : bool
        Whether a training step is calculated too: bf16 autocast, over `plan.batch` contexts with their gists and tail.

    Raises
    ------
    ValueError
        For models without such layers, and for 4-bit weights trained without LoRA.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    >>> found = needs(LlamaConfig(**shape, num_hidden_layers=2), Plan(tokens=1000))
    >>> found.full_cache, found.gist_cache, found.fits(24)["compress"]
    (512000, 5632, True)
    """
    parts = parts_of(config)
    loaded = Precision("nf4" if plan.four_bit else "bfloat16", autocast=False, prepared=False)
    weights = weight_bytes(parts, loaded, double_quant=False)
    rows = gist_rows(plan.tokens, plan.gists, plan.segment_length)
    call = tokens_per_call(plan.tokens, plan.gists, plan.segment_length, call_tokens(parts.hidden, "cuda"))
    found = Needs(
        parameters=parts.parameters,
        weights=weights,
        full_cache=cache_bytes(parts, plan.tokens),
        gist_cache=cache_bytes(parts, rows),
        gist_rows=rows,
        prefill_peak=weights + plan.batch * (cache_bytes(parts, plan.tokens) + reading_bytes(parts, plan.tokens)),
        compress_peak=weights + plan.batch * (cache_bytes(parts, rows) + reading_bytes(parts, call)),
    )
    if not training:
        return found
    gists = ceil(plan.tokens / (plan.segment_length or plan.tokens)) * plan.gists
    lora = SimpleNamespace(
        r=plan.lora,
        lora_dropout=0.0,
        target_modules=sorted({linear.name for linear in parts.linears}),
        modules_to_save=["gist_embeddings"],
    )
    setup = TrainingSetup(
        tokens=plan.tokens + gists + plan.tail,
        batch_size=plan.batch,
        logit_rows=plan.tail,
        num_gist_tokens=plan.gists,
        compact_rows=rows,
        weights="nf4" if plan.four_bit else "bfloat16" if plan.lora else "float32",
        prepared=False,
        double_quant=False,
        lora=lora if plan.lora else None,
        optimizer=plan.optimizer,
        gradient_checkpointing=plan.four_bit if plan.checkpointing is None else plan.checkpointing,
    )
    return replace(found, training=estimate(parts, setup))
