"""``gistkern COMMAND ...``: finds the command and hands over; nothing else is loaded before."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gistkern import __version__
from gistkern.cli.parser import Parser, errors_as_one_line

__all__ = ["COMMANDS", "main"]

# name -> (module with `add_arguments(parser)` and `run(given)`, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("gistkern.cli.doctor", "what works on this machine, and what a model needs"),
    "compress": ("gistkern.cli.compress", "compress documents into a store of gist rows"),
    "train": ("gistkern.cli.train", "train gist tokens on your own rows"),
    "eval": ("gistkern.cli.eval", "answers from gist rows beside the full context"),
    "ask": ("gistkern.cli.ask", "ask about a compressed document"),
    "bench": ("gistkern.cli.bench", "what a model gains on this machine"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command. Exit status 2 for what is refused, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="gistkern", description="Gist-token context compression for Hugging Face models.")
    parser.add_argument("--version", action="version", version=f"gistkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in words[:1]:  # the others' modules are not needed
            found = importlib.import_module(module)
            command.description = (found.__doc__ or summary).strip()
            found.add_arguments(command)
            command.set_defaults(run=found.run, parser=command)
    given, unknown = parser.parse_known_args(words)
    if unknown:  # said by the command's own parser, which knows what may have been meant
        given.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with errors_as_one_line(given.parser), _warnings_of_others():
            given.run(given)
    except KeyboardInterrupt as stopped:
        print(f"stopped{f': {stopped}' if str(stopped) else ''}", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _warnings_of_others() -> Iterator[None]:
    """Without transformers' announcements of names that libraries between us still use (peft reads one at every load).

    Behind whatever `-W` and PYTHONWARNINGS say; a script of the user's own sees all. A module is its path where a
    warning is handed on.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(.*[\\/])?transformers[.\\/]", append=True)
        yield
