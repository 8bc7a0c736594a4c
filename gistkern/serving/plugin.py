"""vLLM finds the connector by its name: the entry point that each of its processes calls before it starts."""

from __future__ import annotations

import contextlib

__all__ = ["register"]


def register() -> None:
    """Make ``GistConnector`` a name that ``vllm serve --kv-transfer-config`` knows. Nothing is loaded until it is used.

    Called by vLLM (entry point ``vllm.general_plugins``), in some processes more than once.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    with contextlib.suppress(ValueError):  # it is known already
        KVConnectorFactory.register_connector("GistConnector", "gistkern.serving.vllm", "GistConnector")
