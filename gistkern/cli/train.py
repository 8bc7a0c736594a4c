"""Train gist tokens on your own questions about contexts, or on conversations.

    gistkern train --data mine.jsonl --model NAME --output runs/mine
    gistkern train --data mine.jsonl --model NAME --output runs/mine --4bit --segment-length 512 --ratio 50
    gistkern train ... --resume                     # goes on from the last checkpoint; more --steps make it longer
    torchrun --nproc-per-node 4 -m gistkern train ...

A line of the file is {"context": "...", "question": "...", "answer": "..."}, taken as it stands unless --chat is given,
or {"messages": [{"role": "...", "content": "..."}, ...]}, whose first message is the context (a system prompt, or a
document), perhaps with a document as "context" in front. Messages go through the model's chat template.

Rows are held out to measure by, and never trained on. The folder gets the adapter (or the model) that answered them
best, the tokenizer, and a model card with the numbers: `gistkern ask`, `compress` and `eval` read it.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gistkern.cli.model import bars_for_people_only
from gistkern.cli.parser import at_least, input_path, output_path
from gistkern.cli.source import look_for
from gistkern.progress import announce

if TYPE_CHECKING:
    from gistkern.training.objectives import Objectives
    from gistkern.training.rows import DataRow

__all__ = ["add_arguments", "run"]

GISTS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=input_path, required=True, help="JSON lines to train on")
    data.add_argument("--eval-data", type=input_path, help="JSON lines to measure by, instead of a share of --data")
    data.add_argument(
        "--eval-share", type=float, default=None, help="of --data, held out by a hash of each row (0.1; 0 for none)"
    )
    data.add_argument(
        "--chat", nargs="?", const="user", choices=("user", "system"), help="contexts stand in this turn of a chat"
    )
    data.add_argument("--no-chat", dest="chat", action="store_const", const="no", help="texts as they stand")
    data.add_argument("--max-length", type=at_least(1), help="rows with more tokens are left out")

    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="folder or hub name of the base model")
    model.add_argument("--output", type=output_path, required=True, help="folder for checkpoints and the result")
    model.add_argument("--4bit", dest="four_bit", action="store_true", help="4-bit weights (bitsandbytes), for LoRA")
    model.add_argument("--lora", type=at_least(0), default=16, metavar="RANK", help="16; 0 trains all weights")
    model.add_argument("--target-modules", nargs="+", default=(), metavar="NAME", help="of LoRA; all linear layers")
    model.add_argument("--dtype", default="auto", help="auto: the checkpoint's with LoRA, else float32")

    gists = parser.add_argument_group("gist tokens")
    gists.add_argument("--gists", type=at_least(1), help=f"gist tokens of a context, or of each segment ({GISTS})")
    gists.add_argument("--segment-length", type=at_least(1), help="tokens of a segment; a context is one by default")
    gists.add_argument("--segment-overlap", type=at_least(0), default=0)
    gists.add_argument("--segment-gists", type=at_least(0), default=0, help="hierarchical: --gists summarize these (0)")
    gists.add_argument(
        "--ratio",
        type=float,
        help="tokens per gist token: sets --gists of a --segment-length, or the length for --gists",
    )
    gists.add_argument("--positions", choices=("absolute", "gist_first"), default="absolute")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--objectives",
        nargs="+",
        default=["answer=1"],
        metavar="NAME=WEIGHT",
        help="answer, distillation (from the full context), reconstruction; answer=1",
    )
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=at_least(1), help="instead of --epochs")
    length.add_argument("--epochs", type=float, default=3.0, help="3")
    training.add_argument("--batch", type=at_least(1), default=4, help="rows of a process, together (4)")
    training.add_argument("--accumulate", type=at_least(1), default=1, help="batches of a step (1)")
    training.add_argument("--rate", type=float, help="learning rate (2e-4 with LoRA, 2e-5 without)")
    training.add_argument("--warmup", type=float, default=0.03, help="steps, or below 1 a share of them (0.03)")
    training.add_argument("--seed", type=at_least(0), default=0)
    training.add_argument("--config", type=input_path, help="YAML of further transformers.TrainingArguments")
    training.add_argument(
        "--resume", action="store_true", help="go on from the last whole checkpoint, perhaps with more steps"
    )

    watching = parser.add_argument_group("watching")
    watching.add_argument("--eval-every", type=at_least(1), help="steps; a fifth of all, at most 500")
    watching.add_argument("--eval-samples", type=at_least(1), default=100, help="held-out rows that are answered (100)")
    watching.add_argument("--save-every", type=at_least(1), help="steps; as --eval-every")
    watching.add_argument("--tensorboard", action="store_true", help="log to runs/ in the output folder too")


def run(given: argparse.Namespace) -> None:
    """Read and check all that can be, train, measure, save, and say what to do next."""
    gists, segment_length = _cut(given)
    if given.four_bit and not given.lora:
        raise ValueError("--4bit weights cannot be trained themselves: leave --lora 0 out")
    if given.eval_data and given.eval_share:
        raise ValueError("--eval-data and --eval-share both say what to measure by: give one of them")
    from gistkern.training.checkpoints import check_unused, to_resume
    from gistkern.training.rows import context_role, held_out, read_rows

    if given.resume:
        to_resume(given.output)
    else:
        check_unused(given.output)
    look_for(given.model)
    rows = read_rows(given.data)
    if given.eval_data:
        others = read_rows(given.eval_data)
        _check_apart(rows, others)
    else:
        rows, others = held_out(rows, 0.1 if given.eval_share is None else given.eval_share)
    config = _config(given.config)
    # here and below: what takes seconds to load, and wrong arguments and rows are refused without
    announce("starting torch and transformers")
    objectives = _objectives(given.objectives)
    bars_for_people_only()
    warnings.filterwarnings("ignore", "the gist rows were never trained")  # the first evaluation may come so early
    from gistkern.training.base import Base, opened_tokenizer, source_of

    try:
        from gistkern.training.finetune import Finetuning, finetune
    except ImportError as error:
        raise ImportError(f"training needs more packages ({error}): pip install 'gistkern[train]'") from error
    from gistkern.training.rows import tokenized

    base = Base(
        source_of(given.model),
        given.dtype,
        given.four_bit,
        given.lora,
        tuple(given.target_modules),
        gists,
        given.segment_gists,
        given.positions,
        given.seed,
    )
    tokenizer = opened_tokenizer(base.name)
    base.computed_in()
    role = context_role([*rows, *others], given.chat, bool(getattr(tokenizer, "chat_template", None)))
    longest = given.max_length or _longest(base, segment_length)
    train = tokenized(rows, tokenizer, role, longest)
    measured = tokenized(others, tokenizer, role, longest) if others else None
    _say(given, [*rows, *others], train, measured, role, longest)
    settings = Finetuning(
        segment_length,
        given.segment_overlap,
        objectives,
        role,
        given.steps,
        given.epochs,
        given.batch,
        given.accumulate,
        given.rate,
        given.warmup,
        given.seed,
        given.eval_every,
        given.eval_samples,
        given.save_every,
        given.tensorboard,
        config,
    )
    note = {"rows": _digest(rows), "held out": _digest(others), "max_length": longest}
    outcome = finetune(base, tokenizer, train, given.output, settings, measured, resume=given.resume, note=note)
    if outcome is not None:
        from gistkern.training.card import write_card

        print(write_card(given.output, base, settings, outcome, _about(given, train, measured)))


def _cut(given: argparse.Namespace) -> tuple[int, int | None]:
    """Gist tokens, and tokens of a segment."""
    gists, length, ratio = given.gists, given.segment_length, given.ratio
    if ratio is None:
        return gists or GISTS, length
    if not 1 <= ratio < float("inf"):
        raise ValueError(f"--ratio must be at least 1 token per gist token, got {ratio}")
    if given.segment_gists:
        raise ValueError("--ratio with --segment-gists: what stays are --gists rows, however long the context is")
    if gists and length:
        raise ValueError("--ratio follows from --gists and --segment-length: give two of the three")
    if length:
        return max(1, round(length / ratio)), length
    return gists or GISTS, round((gists or GISTS) * ratio)


def _check_apart(rows: list[DataRow], others: list[DataRow]) -> None:
    from gistkern.training.rows import check_files_differ

    check_files_differ(rows, others)


def _objectives(given: list[str]) -> Objectives:
    from gistkern.training.objectives import Objectives

    weights = {}
    for word in given:
        name, _, weight = word.partition("=")
        if name not in ("answer", "distillation", "reconstruction", "temperature"):
            raise ValueError(f"--objectives {word}: expected answer, distillation or reconstruction")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--objectives {word}: expected {name}=WEIGHT, a number") from None
    return Objectives(**{"answer": 0.0, **weights})


def _config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} must hold names of transformers.TrainingArguments and their values")
    return {name: _number(value) for name, value in found.items()}


def _number(value: Any) -> Any:
    """PyYAML takes 1e-4 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _longest(base: Any, segment_length: int | None) -> int | None:
    """Positions that the model knows; none where those do not grow with the context."""
    if base.positions == "gist_first" and segment_length is not None:
        return None
    return getattr(base.config(), "max_position_embeddings", None)


def _digest(rows: list[DataRow]) -> str:
    import hashlib
    import json

    text = json.dumps([row.fields for row in rows], sort_keys=True)
    return f"{len(rows)}, sha256 {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _say(
    given: argparse.Namespace, rows: list[DataRow], train: Any, measured: Any, role: str | None, longest: Any
) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    from gistkern.training.rows import unread_fields

    held = "none held out" if measured is None else f"{len(measured.features)} held out"
    how = "texts as they stand" if role is None else f"through the chat template, contexts in the {role} turn"
    print(f"{len(train.features)} rows to train on, {held}; {how}")
    if left := train.too_long + (measured.too_long if measured else 0):
        print(f"{left} rows are longer than {longest} tokens and left out (--max-length)")
    if names := unread_fields(rows):
        print(f"fields that are not read: {', '.join(names)}")


def _about(given: argparse.Namespace, train: Any, measured: Any) -> dict[str, Any]:
    """For the card: the command's own words, and the rows."""
    import shlex
    import sys

    contexts = [len(one["context_ids"]) for one in train.features]
    return {
        "command": shlex.join(["gistkern", *sys.argv[1:]]) if "train" in sys.argv[1:2] else "gistkern.cli.main.main",
        "data": given.data.name,
        "rows": len(train.features),
        "held out": 0 if measured is None else len(measured.features),
        "left out": train.too_long + (measured.too_long if measured else 0),
        "context tokens": f"{min(contexts):,} to {max(contexts):,}, {sum(contexts) / len(contexts):,.0f} on average",
    }
