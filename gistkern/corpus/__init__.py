"""Corpora of compressed documents: `compress_corpus` writes a folder, `GistStore` reads it (docs/guides/corpora.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gistkern.lazy import loaded_on_use

# on first use: the command line's --help waits for no torch
_EXPORTS = {"GistStore": "gistkern.corpus.store", "compress_corpus": "gistkern.corpus.compress"}

__all__, __getattr__, __dir__ = loaded_on_use(__name__, _EXPORTS)

if TYPE_CHECKING:
    from gistkern.corpus.compress import compress_corpus as compress_corpus
    from gistkern.corpus.store import GistStore as GistStore
