"""How much memory a training step takes, calculated: weights, gradients, optimizer, activations, logits.

    python -m bench.calculated.training_memory --config examples/configs/llama3-8b.yaml

prints a Markdown table and whether the step fits a card. The numbers are formulas, checked against what torch
allocates at small scale (docs/memory.md, tests/bench/test_training_memory.py).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml
from transformers import LlamaConfig

from bench.calculated.memory_terms import Precision, Saved, base_bytes, linear_shapes, optimizer_bytes, trained_tensors
from bench.markdown import table

# tokens of a question and its answer, and of the answer alone; a passkey takes no more with a Llama tokenizer
TAIL, ANSWER = 32, 5
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
    """What the memory of a training step depends on, besides the model; ValueError for settings nobody knows."""

    tokens: int  # of one sample: context, gist tokens and tail
    batch_size: int = 1  # samples of one forward; accumulating changes nothing: gradients stay allocated in any case
    logit_rows: int | None = None  # rows of a sample whose logits are computed; all of them by default
    num_gist_tokens: int = 10
    compact_rows: int = 11  # of a sample: all its gist tokens and sinks
    weights: str = "nf4"  # 4 bits for the layers' linears, fp32 for the rest (prepare_model_for_kbit_training)
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
        """What stays between steps."""
        return self.weights + self.trainable + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Peak of a step."""
        return self.resident + self.activations + max(self.logits, self.working)

    def fits(self, card: int, reserve: int = 10**9, paging: bool = False) -> bool:
        """Whether a step fits `card` bytes, of which `reserve` are kept for the driver, the allocator and fragments.

        With `paging` the optimizer's paged states may be on the host until its step, when activations are gone.
        """
        peak = max(self.total - self.paged, self.resident) if paging else self.total
        return peak + reserve <= card

    def table(self) -> str:
        """A Markdown table."""
        sizes = {name: getattr(self, key) for key, name in _ROWS.items()}
        return table(["what", "bytes", "GB"], [[name, f"{n:,}", f"{n / 1e9:.3f}"] for name, n in sizes.items()])


_ROWS = {
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


def estimate(config: Any, setup: TrainingSetup) -> MemoryEstimate:
    """Bytes of a training step of a Llama, Mistral, Qwen2 or Qwen3 model without biases (its transformers config).

    Not in them: the driver's own memory, fragments, and the temporaries of optimizers that are not fused.
    """
    precision = Precision(setup.weights, setup.autocast)
    gists = setup.num_gist_tokens
    trained = trained_tensors(config, precision, setup.lora, gists)
    rows, compact_rows = setup.batch_size * setup.tokens, setup.batch_size * setup.compact_rows
    saved = Saved(config, precision, setup.lora, rows, compact_rows, 4 if setup.on_cpu else 1)
    layer = saved.hidden if setup.gradient_checkpointing else saved.layer
    row = 2 * config.num_hidden_layers * linear_shapes(config)["k_proj"][0] * 2
    trainable = sum(one.elements * one.element for one in trained)
    original_rows = gists * config.hidden_size * precision.base
    return MemoryEstimate(
        weights=0 if setup.lora is None else base_bytes(config, precision, setup.double_quant) + original_rows,
        trainable=trainable,
        gradients=trainable,
        optimizer=optimizer_bytes(trained, OPTIMIZERS[setup.optimizer]),
        activations=config.num_hidden_layers * layer,
        logits=_head(config, setup, saved),
        working=_working(config, setup, saved),
        paged=setup.optimizer.startswith("paged_")
        * optimizer_bytes(trained, OPTIMIZERS[setup.optimizer], paged_only=True),
        kv_gist=row * setup.compact_rows,
        kv_full=row * setup.tokens,
        trainable_parameters=sum(one.elements for one in trained),
    )


def _head(config: Any, setup: TrainingSetup, saved: Saved) -> int:
    """Last norm, output matrix, log-softmax: what they keep, and gradients in flight."""
    rows = setup.tokens if setup.logit_rows is None else setup.logit_rows
    logits, matrix = setup.batch_size * rows * config.vocab_size, config.vocab_size * config.hidden_size
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


def _working(config: Any, setup: TrainingSetup, saved: Saved) -> int:
    """Gradients in flight in a layer's MLP, and what is computed again for it."""
    shapes = linear_shapes(config)
    largest = max(outputs * inputs for outputs, inputs in shapes.values())
    needed = 3 * saved.inner + 3 * saved.norm_input
    if setup.weights == "nf4":
        needed += 2 * largest  # one matrix at a time, without its quantization
    if setup.lora is None:
        needed += largest * saved.precision.base
    return needed + (saved.layer if setup.gradient_checkpointing else 0)


def setup_of(recipe: Mapping[str, Any], all_logits: bool = False) -> TrainingSetup:
    """The setup of a recipe's largest step: the curriculum's longest context in every sample of the batch.

    `recipe` is what examples/configs/*.yaml holds; ValueError if it lacks what memory depends on.
    """
    try:
        gists, training, lora = recipe["gists"]["num_gist_tokens"], recipe["training"], recipe["lora"]
        quantization = recipe.get("quantization")
        return TrainingSetup(
            tokens=max(max(stage["tokens"]) for stage in recipe["curriculum"]["stages"]) + gists + TAIL,
            batch_size=training["per_device_train_batch_size"],
            logit_rows=None if all_logits else ANSWER,
            num_gist_tokens=gists,
            compact_rows=gists + recipe["gists"]["sink_tokens"],
            weights=quantization["bnb_4bit_quant_type"] if quantization else recipe["model"]["dtype"],
            double_quant=bool(quantization and quantization["bnb_4bit_use_double_quant"]),
            autocast=training["bf16"],
            lora=SimpleNamespace(**lora),
            optimizer=training["optim"],
            gradient_checkpointing=training["gradient_checkpointing"],
            teacher=recipe.get("objectives", {}).get("distillation", 0.0) > 0,
        )
    except KeyError as error:
        raise ValueError(f"the recipe lacks {error}") from None


def config_of(recipe: Mapping[str, Any]) -> LlamaConfig:
    """The model's config as a recipe describes it, the rows of a resized vocabulary included."""
    config = LlamaConfig(**recipe["model"]["architecture"])
    if recipe["model"].get("resize_vocabulary"):
        config.vocab_size += recipe["gists"]["num_gist_tokens"]
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a recipe, say examples/configs/llama3-8b.yaml")
    parser.add_argument("--card", type=float, default=24.0, help="memory of the card in GB (10^9 bytes)")
    parser.add_argument("--reserve", type=float, default=1.0, help="GB of it for driver, allocator and fragments")
    parser.add_argument("--all-logits", action="store_true", help="logits of every row, as model(ids, labels=...)")
    given = parser.parse_args(arguments)
    try:
        recipe = yaml.safe_load(given.config.read_text("utf-8"))
        setup = setup_of(recipe, given.all_logits)
        found = estimate(config_of(recipe), setup)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    card, reserve = round(given.card * 1e9), round(given.reserve * 1e9)
    logits = "all rows" if setup.logit_rows is None else f"{setup.logit_rows} rows"
    print(f"{given.config.stem}, calculated: {found.trainable_parameters:,} trained parameters,")
    print(f"{setup.batch_size} x {setup.tokens:,} tokens, logits of {logits}.\n")
    print(found.table())
    size, paged = f"a card of {given.card:g} GB", f"optimizer states ({found.paged / 1e9:.1f} GB) are paged to the host"
    verdict = f"It does not fit {size}, even with the optimizer states paged to the host"
    if found.fits(card, reserve, paging=True):
        verdict = f"It fits {size}" + ("" if found.fits(card, reserve) else f" only while {paged}")
    print(f"\n{verdict} ({given.reserve:g} GB of it kept for the driver and fragments).")


if __name__ == "__main__":
    main()
