"""Gist settings and rows in a transformers checkpoint.

`save_pretrained` of a patched model writes both by itself: the settings in config.json (``gistkern``), the
rows as ``...gist_embeddings.weight`` in the safetensors. `from_pretrained` reads the config, but drops rows
that its class does not know; patching fetches them from the checkpoint, and fails where they are missing.
"""

from __future__ import annotations

import json
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from gistkern.hf.embedding import GistEmbedding

__all__ = ["agreed_settings", "load_rows"]

_KEY = "gist_embeddings.weight"


def agreed_settings(saved: dict[str, Any], given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, as far as `given` names them.

    Raises
    ------
    ValueError
        If a given setting is not the default and contradicts the saved one.
    """
    for name, value in given.items():
        if value not in (defaults[name], saved[name]):
            raise ValueError(
                f"{name}={value!r} contradicts the checkpoint, which was trained with {saved[name]!r}: "
                "leave it out, or delete model.config.gistkern to start afresh"
            )
    return {name: saved[name] for name in given}


def load_rows(model: PreTrainedModel, rows: GistEmbedding) -> None:
    """Fill `rows` from the checkpoint that the model was loaded from; ValueError if they are not there."""
    source = model.config._name_or_path
    problem = f"the checkpoint {source!r} has gist settings but no rows called *{_KEY}"
    file = _file_with_rows(source, getattr(model.config, "_commit_hash", None))
    if file is None:
        raise ValueError(f"{problem}: it was not written by save_pretrained of a patched model")
    path, key = file
    with safe_open(path, "pt") as tensors:
        weight = tensors.get_tensor(key)
    if weight.shape != rows.weight.shape:
        raise ValueError(f"the checkpoint's gist rows are {tuple(weight.shape)}, expected {tuple(rows.weight.shape)}")
    rows.weight.data.copy_(weight)


def _file_with_rows(source: str, revision: str | None) -> tuple[str, str] | None:
    """(safetensors file, key) of the gist rows in a checkpoint folder or hub id."""
    index = _find(source, "model.safetensors.index.json", revision)
    if index is not None:
        with open(index, encoding="utf-8") as handle:
            for key, name in json.load(handle)["weight_map"].items():
                if key.endswith(_KEY) and (shard := _find(source, name, revision)):
                    return shard, key
    single = _find(source, "model.safetensors", revision)
    if single is not None:
        with safe_open(single, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if key.endswith(_KEY):
                    return single, key
    return None


def _find(source: str, name: str, revision: str | None) -> str | None:
    if not source:
        return None
    return cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
