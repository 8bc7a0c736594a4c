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
    from gistkern.hf.load import is_trained

    trained = is_trained(given.model)
    if trained and given.gists is not None:
        raise ValueError(f"{given.model} was trained with a number of gist tokens of its own: leave --gists out")
    if not trained and given.base is not None:
        raise ValueError(f"{given.model} is no adapter: leave --base out")
    model, _, handle = load_model(given, fresh_gists=None if trained else given.gists or _GISTS)
    segment = given.segment_length or (handle.training.segment_length if trained else _SEGMENT)
    from gistkern.cli.side_by_side import measure

    lines, rows = measure(model, given.tokens, given.question, given.answer, segment, given.rounds)
    facts = _facts(given, handle.model, trained) | {"segment_length": segment, "gist_rows": rows}
    if given.json:
        print(json.dumps(facts | {"measured": [line._asdict() for line in lines]}, indent=2))
        return
    print(f"{given.model}: {facts['parameters']:,} parameters, {facts['dtype']}, {facts['device']}")
    if not trained:
        print(f"fresh gist rows, {handle.settings.num_gist_tokens} a segment: it was never trained with any")
    cut = f"segments of {segment:,}" if segment else "one segment"
    print(f"{given.tokens:,} tokens in {cut}: {rows:,} rows; {given.question} asked, {given.answer} decoded\n")
    print("\n".join(_table(lines)))


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


def _table(lines: list[Line]) -> list[str]:
    rows = [("", "full cache", "gist rows", "gain")]
    rows += [
        (one.what, _spelled(one.full, one.unit), _spelled(one.gist, one.unit), f"{one.gain:,.2f}x") for one in lines
    ]
    return [f"{name:<36}{full:>14}{gist:>14}{gain:>12}" for name, full, gist, gain in rows]


def _spelled(value: float, unit: str) -> str:
    if unit == "seconds":
        return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.1f} ms"
    if unit == "bytes":
        size = next((one for one in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= one[0]), (1, "B"))
        return f"{value / size[0]:,.{0 if size[0] == 1 else 1}f} {size[1]}"
    return f"{value:,.1f}"
