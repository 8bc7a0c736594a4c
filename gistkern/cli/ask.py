"""Ask about a compressed document: answers come from its gist rows alone.

    gistkern ask store/ reports/2024.txt "Who signed the report?" "When?"
    gistkern ask --demo         # nothing to prepare: a page with a fresh key in it, and models that are shipped

The model is the one that the store was compressed with, as it names it. The demo asks three ways, and prints what each
keeps of the page, the time it takes, and its answer: gist rows, the full cache, and no context.
"""

from __future__ import annotations

import argparse
import difflib

from gistkern.cli.model import add_model_options, load_model
from gistkern.cli.parser import at_least, input_folder

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("store", nargs="?", type=input_folder, help="a folder that `gistkern compress` wrote")
    parser.add_argument("name", nargs="?", help="the document's")
    parser.add_argument("question", nargs="*", help="what follows the document, as in training")
    parser.add_argument(
        "--demo",
        nargs="?",
        const=True,
        choices=("smollm2", "tiny"),
        help="instead of a store; by default smollm2 where the packages are that it needs, else tiny",
    )
    add_model_options(parser, required=False, where="; by default what the store names")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64, help="of an answer, at most")


def run(given: argparse.Namespace) -> None:
    """Find the document, load its model, print the answers."""
    if given.demo is not None:
        _demo(given)
        return
    if not given.question:
        raise ValueError("what is asked, and about what? STORE NAME QUESTION are needed, or --demo alone")
    from gistkern.corpus.store import GistStore

    if any((given.store / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise ValueError(
            f"{given.store} is a model: compress documents with it first, gistkern compress DOCUMENTS --model"
        )
    store = GistStore(given.store)
    if given.name not in store:
        near = difflib.get_close_matches(given.name, list(store), n=1)
        raise ValueError(
            f"no document {given.name!r} in {given.store}" + (f": did you mean {near[0]!r}?" if near else "")
        )
    about = store.about
    named = about.get("adapter", about.get("model"))
    if not (given.model or named):
        raise ValueError(f"{given.store} does not name all that compressed it: pass --model, what training saved")
    if given.dtype == "auto" and not given.four_bits:  # as it was compressed, where nobody says otherwise
        given.dtype, given.four_bits = about.get("dtype", "auto"), about.get("bits") == "4"
    from gistkern.hf.ask import ask

    base = about.get("model") if about.get("adapter") and not given.model else None
    try:
        model, tokenizer, handle = load_model(given, named, base)
    except ValueError as error:
        said = "" if given.model else f" ({given.store} names it so: pass --model, and --base, where they are now)"
        raise ValueError(f"{error}{said}") from error
    if tokenizer is None:
        raise ValueError("the model has no tokenizer beside it: save it there, or ask with token ids, in Python")
    cache = store[given.name].to(next(handle.inner.parameters()).device)
    answers = ask(
        model, tokenizer, cache, given.question, chat=store.role or False, max_new_tokens=given.max_new_tokens
    )
    for question, answer in zip(given.question, answers, strict=True):
        print(f"{question}\n  {answer.strip()}" if len(answers) > 1 else answer.strip())


def _demo(given: argparse.Namespace) -> None:
    if given.store or given.four_bits or given.model or given.base or given.dtype != "auto":
        raise ValueError("--demo brings its page, question and model: leave all but --device out")
    from gistkern.cli.demonstration import show

    show(None if given.demo is True else given.demo, given.device)
