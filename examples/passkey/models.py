"""The models that are trained: built or loaded, patched, and wrapped in adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from gistkern import GistHandle, demo, patch_llama
from passkey.niah import train_tokenizer
from passkey.settings import Settings, made

__all__ = ["adapted", "base_model", "fast_tokenizer", "loading", "patched", "random_llama", "read_tokenizer"]


@contextmanager
def loading(source: object, what: str) -> Iterator[None]:
    """ValueError, naming the folder, for what torch, transformers and peft raise where something is missing or torn."""
    try:
        yield
    except Exception as error:  # of many kinds
        raise ValueError(f"{source} holds no {what}: {error}") from error


def fast_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of models that start from random weights."""
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), pad_token="<pad>")


def random_llama(settings: Settings) -> LlamaForCausalLM:
    """A Llama of the settings' architecture, from their seed."""
    torch.manual_seed(settings.seed)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(made(LlamaConfig, settings.model.architecture, "model.architecture", **special))


def base_model(settings: Settings) -> PreTrainedModel:
    """The model before it is patched, quantized as the settings say."""
    model = settings.model
    if not model.name:
        return random_llama(settings)
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype)}
    if settings.quantization is not None:
        options["quantization_config"] = made(BitsAndBytesConfig, settings.quantization, "quantization")
    with loading(model.name, "model"):
        loaded = AutoModelForCausalLM.from_pretrained(source_of(settings), **options)
    loaded.name_or_path = model.name  # what adapters note as their base, instead of where it is cached
    return loaded


def source_of(settings: Settings) -> str:
    """Folder or hub name of a pretrained model."""
    model = settings.model
    return str(demo.base(model.gguf_package)) if model.gguf_package else model.name


def patched(settings: Settings) -> tuple[PreTrainedModel, GistHandle, PreTrainedTokenizerBase]:
    """The base model with gist tokens; also what an adapter has to be loaded onto, with the tokenizer beside that.

    `prepare_model_for_kbit_training` belongs to loading: without its fp32 casts a trained adapter's logits move.
    """
    model = base_model(settings)
    found = settings.model.tokenizer or source_of(settings)
    tokenizer = read_tokenizer(found) if found else fast_tokenizer()
    if settings.model.resize_vocabulary:
        # the new rows are never read, so they need no good start
        rows = model.config.vocab_size + settings.gists["num_gist_tokens"]
        model.resize_token_embeddings(rows, mean_resizing=False)
    if settings.quantization is not None:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer turns that on
    handle = made(partial(patch_llama, model, tokenizer), settings.gists, "gists")
    if settings.model.gist_template:
        _start_as(handle, tokenizer(settings.model.gist_template, add_special_tokens=False)["input_ids"])
    return model, handle, tokenizer


def adapted(settings: Settings, model: PreTrainedModel) -> Any:
    """The model with the adapter that is to be trained; itself where there is none."""
    if settings.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    adapter = get_peft_model(model, made(LoraConfig, settings.lora, "lora", task_type="CAUSAL_LM"))
    # peft would write a resized vocabulary a second time, beside the trained copies of modules_to_save
    adapter.save_pretrained = partial(adapter.save_pretrained, save_embedding_layers=False)
    return adapter


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub; ValueError if there is none."""
    with loading(source, "tokenizer"):
        found = AutoTokenizer.from_pretrained(source)
    if not found.is_fast:
        raise ValueError(f"the tokenizer of {source} is a slow one: expected one with a tokenizer.json")
    return found


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
