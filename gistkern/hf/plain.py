"""The trained weights as a checkpoint without anything of gistkern, for engines that read a `plain_prefix`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gistkern.hf.handle import handle_of
from gistkern.hf.peft_state import has_adapters

__all__ = ["check_plain_folder", "save_plain"]


def check_plain_folder(folder: str | os.PathLike, *sources: str | None) -> None:
    """Raise ValueError if a plain model cannot be written there: over a file, or where `sources` were loaded from."""
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place} is a file: pass a folder")
    for source in sources:
        if source and place.is_dir() and Path(source).is_dir() and place.samefile(source):
            raise ValueError(f"{place} holds what was trained, or its base: write the plain model to another folder")


def save_plain(model: Any, folder: str | os.PathLike, tokenizer: Any = None) -> None:
    """Write a patched model as an ordinary checkpoint: adapters merged, without gist rows and settings.

    The model is used up: its adapters are merged into it, and the patch is taken off. vLLM answers from the checkpoint
    and a `GistStore` (`gistkern.serving`).

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Patched; merging computes in the weights' own type.
    folder : path
        To write to.
    tokenizer : PreTrainedTokenizerBase, optional
        Saved beside it.

    Raises
    ------
    ValueError
        If the model is not patched, only its inner model is, its adapters are outside of what is given, or its weights
        are quantized: merging would round the adapter away. If the folder is the one that the model, its adapter or its
        base was loaded from.

    Examples
    --------
    >>> from gistkern.serving import save_plain
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> save_plain(model, "plain", tokenizer)
    >>> from transformers import AutoModelForCausalLM
    >>> hasattr(AutoModelForCausalLM.from_pretrained("plain").config, "gistkern")
    False
    """
    handle = handle_of(model)
    base = handle.model
    if getattr(base, "is_quantized", False):
        raise ValueError(
            "merging into quantized weights would round the adapter away: load it without 4 bits, "
            "gistkern.load(folder, dtype=torch.bfloat16), and write that one"
        )
    if base is handle.inner:
        raise ValueError("only the inner model is patched: engines serve whole causal models")
    merges = hasattr(model, "merge_and_unload")
    if has_adapters(base) and not merges:
        raise ValueError("the model has adapters: pass the PeftModel around it, which merges them")
    check_plain_folder(folder, base.config._name_or_path, handle.adapter)
    if merges:
        model.merge_and_unload()
    handle.unpatch()
    vars(base.config).pop("gistkern", None)  # the settings of a checkpoint that was written patched
    base.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
