"""Something to try: a page of prose, and two small trained models that answer about it from ten rows.

    model, tokenizer, handle = gistkern.demo.load("tiny")

`gistkern ask --demo` shows the same in a terminal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gistkern.lazy import loaded_on_use

_EXPORTS = {
    "base": "gistkern.demo.packaged",
    "folder": "gistkern.demo.models",
    "key": "gistkern.demo.pages",
    "load": "gistkern.demo.models",
    "missing": "gistkern.demo.models",
    "needle": "gistkern.demo.pages",
    "page": "gistkern.demo.pages",
    "plain": "gistkern.demo.models",
    "question": "gistkern.demo.models",
}

__all__, __getattr__, __dir__ = loaded_on_use(__name__, _EXPORTS)

if TYPE_CHECKING:
    from gistkern.demo.models import folder as folder
    from gistkern.demo.models import load as load
    from gistkern.demo.models import missing as missing
    from gistkern.demo.models import plain as plain
    from gistkern.demo.models import question as question
    from gistkern.demo.packaged import base as base
    from gistkern.demo.pages import key as key
    from gistkern.demo.pages import needle as needle
    from gistkern.demo.pages import page as page
