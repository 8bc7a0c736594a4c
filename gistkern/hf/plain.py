"""The trained weights as a checkpoint without anything of gistkern, for engines that read a `plain_prefix`."""

from __future__ import annotations

import os
from typing import Any

from gistkern.hf.handle import handle_of

__all__ = ["save_plain"]


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
        If the model is not patched, only its inner model is, or its weights are quantized: merging would round the
        adapter away.
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
    if hasattr(model, "merge_and_unload"):
        model.merge_and_unload()
    handle.unpatch()
    vars(base.config).pop("gistkern", None)  # the settings of a checkpoint that was written patched
    base.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
