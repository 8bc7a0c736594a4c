"""The largest training step of a recipe: `gistkern.memory` told what examples/configs/*.yaml says (training-memory.md).

python -m bench.calculated.training_memory --config examples/configs/llama3-8b.yaml
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from transformers import LlamaConfig

from bench.markdown import table
from gistkern.memory import ROWS, TrainingSetup, estimate, parts_of

# tokens of a question and its answer, and of the answer alone; a passkey takes no more with a Llama tokenizer
TAIL, ANSWER = 32, 5


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
        found = estimate(parts_of(config_of(recipe)), setup)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    card, reserve = round(given.card * 1e9), round(given.reserve * 1e9)
    logits = "all rows" if setup.logit_rows is None else f"{setup.logit_rows} rows"
    print(f"{given.config.stem}, calculated: {found.trainable_parameters:,} trained parameters,")
    print(f"{setup.batch_size} x {setup.tokens:,} tokens, logits of {logits}.\n")
    sizes = {name: getattr(found, key) for key, name in ROWS.items()}
    print(table(["what", "bytes", "GB"], [[name, f"{n:,}", f"{n / 1e9:.3f}"] for name, n in sizes.items()]))
    size, paged = f"a card of {given.card:g} GB", f"optimizer states ({found.paged / 1e9:.1f} GB) are paged to the host"
    verdict = f"It does not fit {size}, even with the optimizer states paged to the host"
    if found.fits(card, reserve, paging=True):
        verdict = f"It fits {size}" + ("" if found.fits(card, reserve) else f" only while {paged}")
    print(f"\n{verdict} ({given.reserve:g} GB of it kept for the driver and fragments).")


if __name__ == "__main__":
    main()
