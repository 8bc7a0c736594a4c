"""gistkern: kernels, cache and Hugging Face patch for gist-token context compression."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> module; loaded on first use, so that importing gistkern needs neither transformers nor Triton
_EXPORTS = {
    "GistLayout": "gistkern.layout",
    "gist_attention": "gistkern.ops.attention",
    "patch_llama": "gistkern.hf.patch",
    "GistHandle": "gistkern.hf.handle",
    "compress": "gistkern.hf.compress",
    "GistCache": "gistkern.cache.cache",
    "compress_corpus": "gistkern.corpus.compress",
    "GistStore": "gistkern.corpus.store",
    "KeyValueRows": "gistkern.rows",
    "gist_compact": "gistkern.ops.decode",
    "gist_decode": "gistkern.ops.decode",
    "left_padded": "gistkern.layout.streams",
    "plain_prefix": "gistkern.cache.prefix",
    "segments_of": "gistkern.layout.streams",
}

__all__ = [
    "GistCache",
    "GistHandle",
    "GistLayout",
    "GistStore",
    "KeyValueRows",
    "__version__",
    "compress",
    "compress_corpus",
    "gist_attention",
    "gist_compact",
    "gist_decode",
    "left_padded",
    "patch_llama",
    "plain_prefix",
    "segments_of",
]

if TYPE_CHECKING:
    from gistkern.cache.cache import GistCache
    from gistkern.cache.prefix import plain_prefix
    from gistkern.corpus.compress import compress_corpus
    from gistkern.corpus.store import GistStore
    from gistkern.hf.compress import compress
    from gistkern.hf.handle import GistHandle
    from gistkern.hf.patch import patch_llama
    from gistkern.layout import GistLayout
    from gistkern.layout.streams import left_padded, segments_of
    from gistkern.ops.attention import gist_attention
    from gistkern.ops.decode import gist_compact, gist_decode
    from gistkern.rows import KeyValueRows


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'gistkern' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
