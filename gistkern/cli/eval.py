"""Measure a trained model on rows: answers from gist rows, beside the full context and no context at all.

    gistkern eval runs/mine --data test.jsonl
    gistkern eval runs/mine --data mine.jsonl --eval-share 0.1      # the rows that training held out of the file
    gistkern eval runs/mine --data test.jsonl --output answers.jsonl

Answers are greedy. With the full context the adapter is off, so it is the base model that reads; a whole checkpoint
reads with its own weights. Without a context the trained model is asked: what it says right then it did not read.
Answers are compared in lower case, without punctuation and articles; F1 counts words, of scripts without spaces
characters.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gistkern.cli.model import add_loading_options, load_model
from gistkern.cli.parser import at_least, input_path, output_path
from gistkern.cli.source import look_for
from gistkern.progress import announce, bar

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="folder or hub name of what training saved, adapter or checkpoint")
    parser.add_argument("--data", type=input_path, required=True, help="JSON lines, as for `gistkern train`")
    parser.add_argument("--eval-share", type=float, help="only the rows that training with this share held out")
    parser.add_argument("--samples", type=at_least(1), help="the first so many rows")
    parser.add_argument("--only", nargs="+", choices=("gist", "full", "none"), help="some of the three")
    parser.add_argument("--batch", type=at_least(1), default=8, help="rows that are read together")
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), help="of an answer; as many as the longest right one has by default"
    )
    parser.add_argument("--output", type=_file, help="JSON lines of all answers")
    add_loading_options(parser)


def _file(text: str) -> Path:
    output_path(str(Path(text).parent))
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: pass the name of a file")
    return Path(text)


def run(given: argparse.Namespace) -> None:
    """Read the rows, load the model, answer, print the table."""
    from gistkern.training.rows import context_role, held_out, read_rows, tokenized

    rows = read_rows(given.data)
    if given.eval_share is not None:
        rows = held_out(rows, given.eval_share)[1]
        if not rows:
            raise ValueError("--eval-share 0 holds no rows out: leave it out to measure on all")
    rows = rows[: given.samples]
    look_for(given.model)
    announce("starting torch and transformers")
    from gistkern.hf.chat import stop_ids
    from gistkern.training.answering import WAYS, answered, cells
    from gistkern.training.collator import GistDataCollator

    model, tokenizer, handle = load_model(given)
    if tokenizer is None:
        raise ValueError(f"{given.model} has no tokenizer beside it: save that of the training there")
    trained = handle.training
    # of a model that does not say, rows decide
    wanted = trained.role or ("no" if trained.chat is False else None)
    role = context_role(rows, wanted, bool(getattr(tokenizer, "chat_template", None)))
    data = tokenized(rows, tokenizer, role)
    if given.samples is not None:
        data = data.first(given.samples)
    handle.model.generation_config.eos_token_id = stop_ids(handle.model, tokenizer, role is not None) or None
    collator = GistDataCollator(tokenizer, handle, trained.segment_length, trained.segment_overlap)
    ways = [way for way in WAYS if not given.only or way in given.only]
    with bar(total=len(ways) * len(data.features), desc="answering", unit="answer") as shown:
        found = answered(
            model,
            tokenizer,
            data,
            collator,
            ways,
            role=role,
            batch=given.batch,
            max_new_tokens=given.max_new_tokens,
            progress=shown.update,
        )
    if given.output is not None:
        _write(given.output, data.where, found)
    from gistkern.tables import as_text

    print(as_text(*cells({one.way: one.summary() for one in found}, adapter=model is not handle.model)))


def _write(path: Path, where: list[str], found: list[Any]) -> None:
    import json

    from gistkern.files import replacing

    lines = []
    for place, row in enumerate(where):
        said = {one.way: one.said[place] for one in found}
        kept = {"tokens": found[0].tokens[place], "rows": found[0].rows[place]}
        lines.append(json.dumps({"row": row, "right": found[0].right[place], **said, **kept}, ensure_ascii=False))
    with replacing(path) as draft:
        draft.write_text("\n".join(lines) + "\n", "utf-8")
