"""The page that the demo compresses, and the key that is hidden in it."""

from __future__ import annotations

import secrets
import zlib
from pathlib import Path

__all__ = ["key", "needle", "page"]


def page(key: str | None = None) -> str:
    """The page of prose, about 770 tokens of SmolLM2; with a key, that is stated in the middle of it.

    Examples
    --------
    >>> from gistkern import demo
    >>> "Yes, 40917 is the pass key." in demo.page("40917")
    True
    >>> "pass key" in demo.page()
    False
    """
    text = Path(__file__).with_name("page.txt").read_text("utf-8").strip()
    return " ".join(text.format(needle="" if key is None else needle(key)).split())


def needle(key: str) -> str:
    """How the page states a key: in one of the wordings that both models were trained on.

    Examples
    --------
    >>> from gistkern import demo
    >>> demo.needle("40917") in demo.page("40917")
    True
    """
    return f"Remember that the pass key is {key}. Yes, {key} is the pass key."


def key() -> str:
    """Five random digits that no training has shown: of the fifth of all keys that examples/passkey keeps for tests.

    Examples
    --------
    >>> from gistkern import demo
    >>> len(demo.key())
    5
    """
    while True:
        drawn = f"{secrets.randbelow(100_000):05}"
        if zlib.crc32(drawn.encode()) % 5 == 0:
            return drawn
