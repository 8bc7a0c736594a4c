"""A compressed context on disk: one safetensors file with its settings, checksum and model fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gistkern.cache import GistCache, GistLayer
from gistkern.cache_plan import CacheState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load", "save"]

_FORMAT = "gistkern-cache-1"
_STATE_TENSORS = ("seen", "gist_rows", "tail_rows", "tail_position", "tail_is_gist")
_STATE_NUMBERS = ("gist_columns", "tail_columns", "length", "fed", "tail_has_gists", "moving")


def save(cache: GistCache, path: str | os.PathLike) -> None:
    """See `GistCache.save`."""
    state = cache._state()
    tensors = {f"state.{name}": getattr(state, name) for name in _STATE_TENSORS}
    for index, layer in enumerate(cache.layers):
        tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = layer.keys, layer.values
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header: dict[str, Any] = {
        "format": _FORMAT,
        "positions": cache.positions,
        "fingerprint": cache.fingerprint,
        "layers": len(cache.layers),
        "state": {name: getattr(state, name) for name in _STATE_NUMBERS},
    }
    header["sha256"] = _checksum(tensors, header)
    target = Path(path)
    # written beside the target and renamed: a killed process leaves the old file or none
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"gistkern": json.dumps(header)})
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike, model: PreTrainedModel | None, device: torch.device | str) -> GistCache:
    """See `GistCache.load`."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is torn or no safetensors file ({error}): compress the context again") from error
    header = json.loads(metadata.get("gistkern", "{}"))
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a gist cache of format {_FORMAT!r} (found {header.get('format')!r})")
    if header.pop("sha256", None) != _checksum(tensors, header):
        raise ValueError(f"{path} is damaged: its checksum does not match; compress the context again")
    if model is not None:
        device = model.device
    cache = GistCache()
    cache.positions, cache.fingerprint = header["positions"], header["fingerprint"]
    cache.state = CacheState(
        **{name: tensors[f"state.{name}"].to(device) for name in _STATE_TENSORS}, **header["state"]
    )
    for index in range(header["layers"]):
        keys, values = (tensors[f"layers.{index}.{name}"].to(device) for name in ("keys", "values"))
        cache.layers.append(GistLayer.holding(keys, values))
    if model is not None:
        from gistkern.hf.fingerprint import check_cache

        check_cache(cache, model)
    else:
        cache.unchecked = True
    return cache


def _checksum(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
