"""Which model wrote a cache: a digest of its shape and of a sample of every parameter."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gistkern.cache import GistCache
    from gistkern.hf.patch import GistHandle

__all__ = ["check_cache", "check_scheme", "fingerprint"]

_SAMPLE = 64  # values read of each parameter: a training step moves all of them


def fingerprint(inner: nn.Module) -> str:
    """Hex digest of names, shapes and sampled values of the parameters (adapters and gist rows included)."""
    digest = hashlib.sha256()
    values = []
    idle = _idle_adapters(inner)
    for name, parameter in inner.named_parameters():
        if any(f".{adapter}." in name for adapter in idle):
            continue
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        values.append(flat[:: max(1, flat.numel() // _SAMPLE)].to(torch.float32))
    digest.update(torch.cat([v.to(values[0].device) for v in values]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _idle_adapters(inner: nn.Module) -> set[str]:
    """Names of the peft adapters that are loaded and not in use: they do not change what the model computes."""
    loaded: set[str] = set()
    active: set[str] = set()
    for module in inner.modules():
        for holder in ("lora_A", "modules_to_save"):
            loaded |= set(getattr(module, holder, {}))
        if hasattr(module, "active_adapters") and not getattr(module, "disable_adapters", False):
            active |= set(module.active_adapters)  # type: ignore[arg-type]
    return loaded - active


def check_scheme(cache: GistCache, handle: GistHandle) -> None:
    """Raise ValueError if the cache was written under another position scheme than the handle's."""
    if cache.positions not in (None, handle.positions):
        raise ValueError(
            f"the cache was written with positions={cache.positions!r}, the model is patched with "
            f"positions={handle.positions!r}: patch it with the scheme it was trained with"
        )


def check_cache(cache: GistCache, model: PreTrainedModel) -> None:
    """Raise ValueError unless `model` (patched) wrote `cache`."""
    from gistkern.hf.patch import handle_of

    handle = handle_of(model)
    check_scheme(cache, handle)
    dtype = cache.layers[0].dtype if cache.layers else None
    if dtype not in (None, model.dtype):
        raise ValueError(f"the cache holds {dtype}, the model {model.dtype}: load the model in {dtype}")
    if cache.fingerprint is not None and cache.fingerprint != fingerprint(handle.inner):
        raise ValueError("the cache was written by another model (or by other weights): compress the context again")
