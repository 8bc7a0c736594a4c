"""The models that the presets train: built, wrapped in adapters, and read back from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import smollm2
from gistkern import GistHandle, patch_llama
from passkey.niah import read_tokenizer, train_tokenizer
from presets import Preset

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["build", "full_context", "loading", "read", "tiny_llama"]

# rank and scale as in the proof of concept
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
VOCABULARY = 1024

Model: TypeAlias = "LlamaForCausalLM | PeftModel"


def build(settings: Preset, seed: int) -> tuple[Model, GistHandle, Tokenizer]:
    """A preset's model before its training: patched, and wrapped in LoRA if it is a pretrained one."""
    if settings.model == "tiny":
        model = tiny_llama(seed)
        return model, _patched(model, settings), train_tokenizer(VOCABULARY)
    # only here: peft and what it imports take longer than the tiny model needs to load, in every process of measure.py
    from peft import LoraConfig, get_peft_model

    base, tokenizer = smollm2.pretrained()
    handle = _patched(base, settings)
    if settings.gist_template:
        _start_as(handle, tokenizer.encode(settings.gist_template, add_special_tokens=False).ids)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=["gist_embeddings"]))
    return model, handle, tokenizer


@contextmanager
def loading(folder: object) -> Iterator[None]:
    """ValueError, naming the folder, for whatever torch, safetensors and peft raise over weights that do not fit."""
    try:
        yield
    except (RuntimeError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def read(checkpoint: Path, settings: Preset, trainable: bool = False) -> tuple[Model, GistHandle, Tokenizer]:
    """The model of a checkpoint. An adapter stays one if it is to be `trainable`, else it is merged."""
    tokenizer = read_tokenizer(checkpoint / "tokenizer.json")
    if settings.model == "tiny":
        with loading(checkpoint):
            model = LlamaForCausalLM.from_pretrained(checkpoint)
            return model, patch_llama(model), tokenizer
    from peft import PeftModel

    base, _ = smollm2.pretrained()
    handle = _patched(base, settings)
    with loading(checkpoint):
        adapted = PeftModel.from_pretrained(base, checkpoint, is_trainable=trainable)
    return adapted if trainable else adapted.merge_and_unload(), handle, tokenizer


def full_context(checkpoint: Path, settings: Preset) -> LlamaForCausalLM:
    """The model to compare with, whole contexts in sight: unpatched, and a pretrained one without its adapters."""
    if settings.model != "tiny":
        return smollm2.pretrained()[0]
    model, handle, _ = read(checkpoint, settings)
    handle.unpatch()
    return model


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """A Llama of about 230k parameters with random weights.

    `initializer_range` is the largest lever: at transformers' 0.02 so small a model stays on its plateau.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _patched(model: LlamaForCausalLM, settings: Preset) -> GistHandle:
    return patch_llama(
        model,
        num_gist_tokens=settings.gist_tokens,
        num_segment_gist_tokens=settings.segment_gist_tokens,
        positions=settings.positions,
        sink_tokens=settings.sink_tokens,
    )


@torch.no_grad()
def _start_as(handle: GistHandle, ids: list[int]) -> None:
    """Let the gist rows start as the last of these tokens, segment gists too."""
    words = handle.inner.get_input_embeddings().weight
    rows = handle.inner.gist_embeddings.weight
    for own in (handle.gist_token_ids, handle.segment_gist_token_ids):
        if len(own) > len(ids):
            raise ValueError(f"gist_template has {len(ids)} tokens for {len(own)} gist tokens: make it longer")
        for place, word in zip(own, ids[len(ids) - len(own) :], strict=True):
            rows[place - handle.first_id] = words[word]
