"""What a model gains on this machine: gist rows in place of the full cache of the same weights, side by side.

    gistkern bench runs/mine --tokens 8000
    gistkern bench HuggingFaceTB/SmolLM2-135M --gists 10 --segment-length 512

Random tokens are read and answered, so speed and memory are measured and answers are not judged. Both sides take turns
in one process; printed are medians, and the median of what each round gains.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import TYPE_CHECKING, Any

from gistkern.cli.model import add_loading_options, load_model
from gistkern.cli.parser import at_least
from gistkern.cli.source import look_for
from gistkern.progress import announce, bar
from gistkern.tables import as_text, nbytes_said

if TYPE_CHECKING:
    from gistkern.cli.side_by_side import Line

__all__ = ["add_arguments", "run"]

_SEGMENT, _GISTS = 512, 10  # of a model that was never trained with any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="folder or hub name: of what training saved, or of any model that is supported")
    add_loading_options(parser)
    parser.add_argument("--tokens", type=at_least(1), default=4096, help="of the context (4096)")
    parser.add_argument("--question", type=at_least(1), default=32, help="tokens of the question behind it (32)")
    parser.add_argument("--answer", type=at_least(1), default=32, help="tokens that are decoded (32)")
    parser.add_argument("--segment-length", type=at_least(1), help=f"as in training; {_SEGMENT} for an untrained model")
    parser.add_argument("--gists", type=at_least(1), help=f"of an untrained model, for each segment ({_GISTS})")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="of both sides, behind one that is left out (5)")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(given: argparse.Namespace) -> None:
    """Load, measure, print."""
    look_for(given.model)
    announce("starting torch and transformers")
    from gistkern.hf.load import is_trained

    trained = is_trained(given.model)
    if trained and given.gists is not None:
        raise ValueError(f"{given.model} was trained with a number of gist tokens of its own: leave --gists out")
    if not trained and given.base is not None:
        raise ValueError(f"{given.model} is no adapter: leave --base out")
    model, _, handle = load_model(given, fresh_gists=None if trained else given.gists or _GISTS)
    segment = given.segment_length or (handle.training.segment_length if trained else _SEGMENT)
    from gistkern.cli.side_by_side import measure

    with bar(total=given.rounds + 1, desc="measuring", unit="round") as shown:
        sizes = given.tokens, given.question, given.answer
        lines, rows = measure(model, *sizes, segment, given.rounds, shown.update)
    facts = _facts(given, handle.model, trained) | {"segment_length": segment, "gist_rows": rows}
    if given.json:
        print(json.dumps(facts | {"measured": [line._asdict() for line in lines]}, indent=2))
        return
    print(f"{given.model}: {facts['parameters']:,} parameters, {facts['dtype']}, {facts['device']}")
    if not trained:
        print(f"fresh gist rows, {handle.settings.num_gist_tokens} a segment: it was never trained with any")
    cut = f"segments of {segment:,}" if segment else "one segment"
    print(f"{given.tokens:,} tokens in {cut}: {rows:,} rows; {given.question} asked, {given.answer} decoded\n")
    print(_table(lines))


def _facts(given: argparse.Namespace, model: Any, trained: bool) -> dict[str, Any]:
    import torch
    import transformers

    from gistkern import __version__

    place = next(model.parameters()).device
    cuda = place.type == "cuda"
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    return {
        "model": given.model,
        "trained": trained,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(place) if cuda else f"{platform.machine()} CPU, {threads}",
        "versions": {"gistkern": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        **{name: getattr(given, name) for name in ("tokens", "question", "answer", "rounds")},
    }


def _table(lines: list[Line]) -> str:
    rows = [
        [one.what, *(_spelled(side, one.unit) for side in (one.full, one.gist)), f"{one.gain:,.2f}x"] for one in lines
    ]
    return as_text(["", "full cache", "gist rows", "gain"], rows)


def _spelled(value: float, unit: str) -> str:
    if unit == "seconds":
        return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.1f} ms"
    if unit == "bytes":
        return nbytes_said(value)
    return f"{value:,.1f}"
