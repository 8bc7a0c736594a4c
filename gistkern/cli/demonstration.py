"""What `gistkern ask --demo` prints."""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gistkern import demo
from gistkern.tables import WIDEST

if TYPE_CHECKING:
    from rich.table import Table

    from gistkern.cli.three_ways import Way

__all__ = ["show"]

_MODELS = {
    "smollm2": "SmolLM2-135M-Instruct, with an adapter and ten gist rows",
    "tiny": "tiny: 231,104 parameters, trained for this one task",
}
_NOTES = {
    "smollm2": "Full cache and no context are answered by the pretrained model without the adapter.",
    "tiny": "Full cache and no context are answered by the same weights, which were trained to answer from gist rows "
    "and from nothing else: --demo smollm2 compares with a pretrained model.",
}


def show(name: str | None, device: str | None) -> None:
    """Hide a fresh key in the page, ask for it three ways, print a table. Without a name: the best that is there."""
    name = name or _best()
    if commands := demo.missing(name):
        raise ImportError(f"the demo {name} needs more packages: {', and '.join(commands)}")
    import torch
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text
    from transformers.utils import logging

    from gistkern.cache.file import check_device
    from gistkern.cli.three_ways import three_ways

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    logging.disable_progress_bar()
    key = demo.key()
    console = Console(width=min(WIDEST, Console().width), highlight=False)
    before, needle, after = _around(key)
    console.print("In the middle of a page of prose stands a key that was drawn just now:\n")
    excerpt = Text.assemble(f"... {before} ", (needle, "bold"), f" {after} ...")
    console.print(Padding(excerpt, (0, 4)), "")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*past_key_values. is deprecated", FutureWarning)
        ways, tokens = three_ways(name, key, device, _said)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu(torch.get_num_threads())
    console.print(f"\n{_MODELS[name]}; {where}")
    console.print(
        f"{tokens:,} tokens are read, then {demo.question(name).strip()!r} is to be continued by five digits:\n"
    )
    console.print(_table(ways, key))
    gist, full, _ = ways
    less = full.nbytes / gist.nbytes
    console.print(f"{gist.rows:,} rows are kept of the page in place of {full.rows:,}: {less:,.0f} times fewer bytes.")
    console.print(_NOTES[name])


def _best() -> str:
    """SmolLM2 where all is there that it needs; else tiny, and what is missing is said."""
    if not (commands := demo.missing("smollm2")):
        return "smollm2"
    print(f"This is the tiny model. For SmolLM2-135M first: {', and '.join(commands)}\n", flush=True)
    return "tiny"


def _around(key: str) -> tuple[str, str, str]:
    """The needle, and what stands beside it."""
    needle = demo.needle(key)
    before, after = (part.strip() for part in demo.page(key).split(needle))
    return before[before.rindex(". ") + 2 :], needle, after[: after.index(". ") + 1]


@contextmanager
def _said(what: str) -> Iterator[None]:
    """A line for what may take longer than a second."""
    print(f"{what} ... ", end="", file=sys.stderr, flush=True)
    began = time.perf_counter()
    yield
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def _cpu(threads: int) -> str:
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


def _table(ways: list[Way], key: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("kept", no_wrap=True)
    for name in ("rows", "bytes", "reading", "answering"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("answer", "right?"):
        table.add_column(name, no_wrap=True)
    for way in ways:
        reading, said = f"{way.reading:.2f} s" if way.rows else "-", " ".join(way.said.split())
        numbers = f"{way.rows:,}", f"{way.nbytes:,}", reading, f"{way.answering:.2f} s"
        table.add_row(way.kept, *numbers, Text(said), "yes" if said == key else "no")  # Text: it may look like markup
    return table
