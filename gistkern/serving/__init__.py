"""Other engines answer from a store of compressed documents (docs/serving.md). Loaded on first use, vLLM with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gistkern.serving.vllm import GistConnector, request_for, transfer_config

__all__ = ["GistConnector", "request_for", "transfer_config"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'gistkern.serving' has no attribute {name!r}")
    return getattr(importlib.import_module("gistkern.serving.vllm"), name)
