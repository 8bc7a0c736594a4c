"""Other engines answer from a store (docs/guides/vllm.md). Loaded on first use, vLLM with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gistkern.lazy import loaded_on_use

_EXPORTS = {
    "GistConnector": "gistkern.serving.vllm",
    "request_for": "gistkern.serving.vllm",
    "save_plain": "gistkern.hf.plain",
    "transfer_config": "gistkern.serving.vllm",
}

__all__, __getattr__, __dir__ = loaded_on_use(__name__, _EXPORTS)

if TYPE_CHECKING:
    from gistkern.hf.plain import save_plain as save_plain
    from gistkern.serving.vllm import GistConnector as GistConnector
    from gistkern.serving.vllm import request_for as request_for
    from gistkern.serving.vllm import transfer_config as transfer_config
