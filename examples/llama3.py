"""Train a recipe of examples/configs/ with transformers' Trainer: 4-bit weights, LoRA, gist rows.

`train_niah.py --preset llama3-8b` calls this. A dry run steps through the same code with a random model of the same
class and tiny dimensions, short contexts and few steps, on whatever machine it is started.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from checkpoints import newest, recipe_of
from gistkern import GistHandle, patch_llama
from gistkern.training import Curriculum, GistDataCollator, GistTrainer
from gistkern.training.recipe import CurriculumSection, Recipe, read_recipe
from models import loading
from opened import Opened
from passkey.niah import Haystack, train_tokenizer
from results import newest_whole

__all__ = [
    "DRY_STEPS",
    "PasskeyDataset",
    "load_base",
    "load_trained",
    "make_trainer",
    "open_trained",
    "tiny",
    "train_from_config",
]

DRY_STEPS = 4
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def train_from_config(
    path: str | Path,
    run: str | Path,
    model: str | None = None,
    tokenizer: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Path | None:
    """Train the recipe in `path`; returns the folder of the trained adapter, or None in all processes but the main one.

    Parameters
    ----------
    path : str or Path
        A YAML file (`gistkern.training.recipe`).
    run : str or Path
        Output folder: checkpoints, log.jsonl, recipe.json, and in the end adapter/.
    model, tokenizer : str, optional
        Folders or hub names; the recipe's model, and the tokenizer that comes with the model, by default.
    resume, overwrite : bool
        Go on from the newest checkpoint, or replace what an earlier run left.
    dry_run : bool
        Tiny dimensions, short contexts, few and small steps, all else as in the recipe, on a model of its own.

    Raises
    ------
    ValueError
        For a bad recipe, a folder in use, nothing to resume, or a run of another recipe.
    """
    recipe, run = read_recipe(path), Path(run)
    if dry_run:
        if model is not None or tokenizer is not None:
            raise ValueError("a dry run makes its own model and tokenizer: leave them out")
        recipe = tiny(recipe)
    source = model or (str(run / "tiny-model") if dry_run else recipe.model.name)
    state = PartialState(cpu=not torch.cuda.is_available())
    checkpoint = _checked(run, recipe, resume, overwrite)
    state.wait_for_everyone()  # all have looked before one of them clears
    if state.is_main_process and not resume:
        _clear(run, recipe)
        if dry_run:
            _write_tiny_model(recipe, Path(source))
    state.wait_for_everyone()
    trainer = make_trainer(recipe, source, tokenizer or source, run)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(run / "adapter"))
    state.wait_for_everyone()
    is_main = state.is_main_process
    state.destroy_process_group()  # what follows is for the main process alone
    return run / "adapter" if is_main else None


def make_trainer(recipe: Recipe, source: str, tokenizer_source: str, run: Path) -> GistTrainer:
    """Model, data and Trainer of a recipe, ready to train."""
    base, handle, tokenizer = load_base(recipe, source, tokenizer_source)
    model = get_peft_model(base, recipe.lora.config())
    # peft would write a resized vocabulary a second time, beside the trained copies of modules_to_save
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    training, curriculum = recipe.training, recipe.curriculum.curriculum()
    on_cpu = not torch.cuda.is_available()
    if on_cpu and training.optim.startswith("paged_"):
        print(
            f"NOTE: no GPU. {training.optim} runs, but bitsandbytes pages nothing on a CPU: "
            "its states stay in ordinary memory.",
            file=sys.stderr,
        )
    arguments = training.arguments(run, curriculum.max_steps, use_cpu=on_cpu)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * arguments.world_size
    return GistTrainer(
        model=model,
        args=arguments,
        data_collator=GistDataCollator(tokenizer, handle, teacher=recipe.objectives.distillation > 0),
        train_dataset=PasskeyDataset(recipe, tokenizer, curriculum, curriculum.max_steps * batch),
        objectives=recipe.objectives,
        curriculum=curriculum,
    )


def load_base(
    recipe: Recipe, source: str, tokenizer_source: str
) -> tuple[PreTrainedModel, GistHandle, PreTrainedTokenizerBase]:
    """The frozen base model, patched; also what an adapter has to be loaded onto.

    `prepare_model_for_kbit_training` belongs to loading: without its fp32 casts a trained adapter's logits move.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source)
    quantization = recipe.quantization
    model = load_plain(recipe, source)
    if recipe.model.resize_vocabulary:
        # the new rows are never read, so they need no good start
        model.resize_token_embeddings(model.config.vocab_size + recipe.gists.num_gist_tokens, mean_resizing=False)
    if quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer turns that on
    handle = patch_llama(model, tokenizer, **asdict(recipe.gists))
    return model, handle, tokenizer


def load_plain(recipe: Recipe, source: str) -> PreTrainedModel:
    """The base model as it is, quantised as the recipe says."""
    quantization = recipe.quantization
    with loading(source):
        return AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, recipe.model.dtype),
            quantization_config=None if quantization is None else quantization.config(),
        )


def load_trained(recipe: Recipe, adapter: str | Path, source: str) -> tuple[PeftModel, GistHandle]:
    """A trained adapter on its base model, for evaluation; the tokenizer is the one saved with the adapter."""
    base, handle, _ = load_base(recipe, source, str(adapter))
    with loading(adapter):
        return PeftModel.from_pretrained(base, adapter).eval(), handle


def open_trained(adapter: Path, source: str | None = None, recipe_file: Path | None = None) -> Opened:
    """An adapter of a recipe's run, the last or any checkpoint, ready to be evaluated.

    Parameters
    ----------
    adapter : Path
        Its folder.
    source : str, optional
        Of the base model; that of the recipe, or of the dry run, by default.
    recipe_file : Path, optional
        The run's recipe.json, for an adapter that was copied away from its run.
    """
    file = recipe_file or recipe_of(adapter)
    if file is None:
        raise ValueError(f"{adapter} belongs to no run of a recipe: no recipe.json in it or above it")
    recipe, dry = read_recipe(file), file.parent / "tiny-model"
    source = source or (str(dry) if dry.exists() else recipe.model.name)
    model, handle = load_trained(recipe, adapter, source)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    # a curriculum can end early: the Trainer knows how many steps there were
    state = next(one for one in (adapter, newest(file.parent)) if (one / "trainer_state.json").exists())
    steps = json.loads((state / "trainer_state.json").read_text())["global_step"]
    return Opened(
        about={
            "preset": file.parent.name,
            "checkpoint": adapter.name,
            "seed": recipe.training.seed,
            "training": {"steps": steps},
        },
        model=model,
        handle=handle,
        tokenizer=tokenizer.backend_tokenizer,
        full=lambda: load_plain(recipe, source),
        grid=tuple((row.language, row.tokens, row.samples, row.filler, row.wordings) for row in recipe.evaluation.rows),
        asked_by="question",
        compression={},
        start=tokenizer("")["input_ids"],
    )


class PasskeyDataset(Dataset):
    """Passkey samples by number: the number alone decides a sample, within the curriculum's present stage.

    So a resumed run goes on with the samples that the interrupted one had not seen, if it has as many processes: with
    others the Trainer's batches, and the order in which they come, are others too.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, curriculum: Curriculum, samples: int
    ) -> None:
        self.seed, self.curriculum, self.samples = recipe.training.seed, curriculum, samples
        # what the tokenizer puts in front of a text (Llama 3: <|begin_of_text|>), which a haystack has not
        self.start: list[int] = tokenizer("")["input_ids"]
        data = recipe.data
        self.haystacks = [
            Haystack(
                tokenizer.backend_tokenizer,
                language,
                False,
                random.Random(f"{self.seed}-{language}"),
                filler=data.filler,
            )
            for language in data.languages
        ]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng, stage = random.Random(f"{self.seed}-{index}"), self.curriculum.stage
        haystack = rng.choice(self.haystacks)
        haystack.rng = rng
        ids, sample = haystack.draw(rng.randint(*stage.tokens), rng.uniform(*stage.depth), rng.randint(*stage.keys))
        return {
            "context_ids": self.start + ids,
            "question_ids": haystack.encode(sample.question),
            "answer_ids": haystack.encode(sample.answer),
        }


def tiny(recipe: Recipe) -> Recipe:
    """The recipe of a dry run."""
    architecture: dict[str, Any] = {
        **recipe.model.architecture,
        **TINY,
        "vocab_size": train_tokenizer().get_vocab_size(),
    }
    stages = recipe.curriculum.stages
    asked = tuple(replace(row, tokens=120, samples=3) for row in recipe.evaluation.rows)
    short = tuple(replace(stage, steps=DRY_STEPS // len(stages), tokens=(96, 112)) for stage in stages)
    return replace(
        recipe,
        model=replace(recipe.model, architecture=architecture),
        curriculum=CurriculumSection(short, patience=1.0),
        evaluation=replace(recipe.evaluation, rows=asked),
        training=replace(recipe.training, warmup_steps=0, save_steps=DRY_STEPS // 2, gradient_accumulation_steps=2),
    )


def _write_tiny_model(recipe: Recipe, folder: Path) -> None:
    """Random weights and the tiny preset's tokenizer, as a checkpoint to load like any other."""
    torch.manual_seed(recipe.training.seed)
    config = LlamaConfig(**recipe.model.architecture, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    LlamaForCausalLM(config).to(getattr(torch, recipe.model.dtype)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), pad_token="<pad>").save_pretrained(folder)


def _checked(run: Path, recipe: Recipe, resume: bool, overwrite: bool) -> str | None:
    """The checkpoint to resume from, if any; ValueError for a folder in use, or where nothing can be resumed."""
    file = run / "recipe.json"
    if resume:
        checkpoint = newest_whole(run)
        if checkpoint is None:
            raise ValueError(f"nothing to resume: {run} holds no checkpoint")
        if file.read_text() != _written(recipe):
            raise ValueError(
                f"{run} is a run of another recipe (see {file}): resume with the recipe it was started with"
            )
        return str(checkpoint)
    if run.exists() and any(run.iterdir()) and not overwrite:
        raise ValueError(f"{run} is in use: resume it, overwrite it, or name another folder")
    return None


def _clear(run: Path, recipe: Recipe) -> None:
    """A folder for a fresh run, without what an earlier one trained."""
    for folder in (*run.glob("checkpoint-*"), run / "adapter", run / "tiny-model"):
        shutil.rmtree(folder, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.json").write_text(_written(recipe))


def _written(recipe: Recipe) -> str:
    return json.dumps(asdict(recipe), indent=2)
