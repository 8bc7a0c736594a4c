"""Corpora of compressed documents: `compress_corpus` writes a folder, `GistStore` reads it (docs/distributed.md)."""

from gistkern.corpus.compressing import compress_corpus
from gistkern.corpus.store import GistStore

__all__ = ["GistStore", "compress_corpus"]
