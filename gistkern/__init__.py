"""gistkern: kernels, cache and Hugging Face patch for gist-token context compression."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gistkern.lazy import loaded_on_use

__version__ = "0.1.0"

# public name -> module; loaded on first use, so that importing gistkern needs neither transformers nor Triton
_EXPORTS = {
    "GistLayout": "gistkern.layout",
    "gist_attention": "gistkern.ops.attention",
    "patch": "gistkern.hf.patch",
    "patch_llama": "gistkern.hf.patch",
    "load": "gistkern.hf.load",
    "ask": "gistkern.hf.ask",
    "Chat": "gistkern.hf.conversation",
    "GistHandle": "gistkern.hf.handle",
    "compress": "gistkern.hf.compress",
    "GistCache": "gistkern.cache.cache",
    "RawSegments": "gistkern.cache.raw",
    "compress_corpus": "gistkern.corpus.compress",
    "GistStore": "gistkern.corpus.store",
    "KeyValueRows": "gistkern.rows",
    "gist_compact": "gistkern.ops.decode",
    "gist_decode": "gistkern.ops.decode",
    "left_padded": "gistkern.layout.streams",
    "plain_prefix": "gistkern.hf.prefix",
    "segments_of": "gistkern.layout.streams",
}

# modules that are public as a whole; what else there is, is free to change
_SUBMODULES = ("backends", "demo", "serving", "testing", "training")

__all__, __getattr__, __dir__ = loaded_on_use(__name__, _EXPORTS, _SUBMODULES)

if TYPE_CHECKING:
    from gistkern.cache.cache import GistCache as GistCache
    from gistkern.cache.raw import RawSegments as RawSegments
    from gistkern.corpus.compress import compress_corpus as compress_corpus
    from gistkern.corpus.store import GistStore as GistStore
    from gistkern.hf.ask import ask as ask
    from gistkern.hf.compress import compress as compress
    from gistkern.hf.conversation import Chat as Chat
    from gistkern.hf.handle import GistHandle as GistHandle
    from gistkern.hf.load import load as load
    from gistkern.hf.patch import patch as patch
    from gistkern.hf.patch import patch_llama as patch_llama
    from gistkern.hf.prefix import plain_prefix as plain_prefix
    from gistkern.layout import GistLayout as GistLayout
    from gistkern.layout.streams import left_padded as left_padded
    from gistkern.layout.streams import segments_of as segments_of
    from gistkern.ops.attention import gist_attention as gist_attention
    from gistkern.ops.decode import gist_compact as gist_compact
    from gistkern.ops.decode import gist_decode as gist_decode
    from gistkern.rows import KeyValueRows as KeyValueRows
