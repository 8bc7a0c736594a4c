"""The model that a command is given: a checkpoint or an adapter, on a device."""

from __future__ import annotations

import argparse
import os
from typing import Any

from gistkern.progress import announce, is_watched

__all__ = ["add_loading_options", "add_model_options", "bars_for_people_only", "load_model"]


def add_model_options(parser: argparse.ArgumentParser, required: bool = True, where: str = "") -> None:
    """Options that say which model, and how it is loaded."""
    parser.add_argument(
        "--model", required=required, help=f"folder or hub name of what training saved, adapter or checkpoint{where}"
    )
    add_loading_options(parser)


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how a model is loaded."""
    parser.add_argument("--base", help="of an adapter: its base model, where it is not found by the adapter's own name")
    parser.add_argument(
        "--4bit", dest="four_bits", action="store_true", help="load the weights in 4 bits (bitsandbytes)"
    )
    parser.add_argument("--dtype", default="auto", help="of the model: auto (default), float32, bfloat16 or float16")
    parser.add_argument("--device", help="by default this process's GPU, or the CPU")


def bars_for_people_only() -> None:
    """Turn transformers' bars off where nobody watches: in a file each of their steps would be a line."""
    from transformers.utils import logging

    if not is_watched():
        logging.disable_progress_bar()


def load_model(
    given: argparse.Namespace, model: str | None = None, base: str | None = None, fresh_gists: int | None = None
) -> tuple[Any, Any, Any]:
    """Model, tokenizer and handle of the options, or of `model` and `base` where those are not given.

    With `fresh_gists` the model is one without gist rows, and gets as many fresh ones.

    Raises
    ------
    ValueError
        For what cannot be loaded, a device that is not there, or a type that no model computes in.
    """
    import torch

    from gistkern.cache.file import check_device
    from gistkern.hf.load import four_bits, load

    device = given.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    check_device(device)
    dtype: Any = getattr(torch, given.dtype, None)
    if given.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype {given.dtype} is none that a model computes in: pass auto, float32 or bfloat16")
    bars_for_people_only()
    announce(f"loading {given.model or model}{', to 4 bits' * given.four_bits}")
    options: dict[str, Any] = {"dtype": given.dtype}
    if given.four_bits:
        options["quantization_config"] = four_bits(torch.bfloat16 if given.dtype == "auto" else dtype)
        options["device_map"] = {"": device}
    if fresh_gists is not None:
        from transformers import AutoModelForCausalLM

        from gistkern.hf.patch import patch

        found, tokenizer = AutoModelForCausalLM.from_pretrained(given.model, **options).eval(), None
        try:
            handle = patch(found, num_gist_tokens=fresh_gists)
        except TypeError as error:  # of a family that is refused
            raise ValueError(str(error)) from error
    else:
        found, tokenizer, handle = load(given.model or model or "", given.base or base, **options)
    return found if given.four_bits else found.to(device), tokenizer, handle
