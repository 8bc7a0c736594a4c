"""Corpora of compressed documents: `compress_corpus` writes a folder, `GistStore` reads it (docs/distributed.md)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gistkern.corpus.compress import compress_corpus
    from gistkern.corpus.store import GistStore

__all__ = ["GistStore", "compress_corpus"]


def __getattr__(name: str) -> object:
    # on first use: the command line's --help waits for no torch
    modules = {"GistStore": "gistkern.corpus.store", "compress_corpus": "gistkern.corpus.compress"}
    if name not in modules:
        raise AttributeError(f"module 'gistkern.corpus' has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name]), name)
