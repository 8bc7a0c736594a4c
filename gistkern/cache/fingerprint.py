"""Which model wrote a cache: a digest of its shape and of a sample of every parameter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gistkern.cache.offload import on_device
from gistkern.cache.packed import is_packed, sample_before_packing, shape_before_packing
from gistkern.cache.reader import Reader, patched
from gistkern.cache.windows import layer_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adapters_in_use", "check_cache", "check_scheme", "fingerprint", "named_modules", "weights_in_use"]

_SAMPLE = 64  # values read of each parameter: a training step moves all of them
_SHAPING = ("model_type", "hidden_act", "rms_norm_eps", "rope_parameters")  # of a config, beside the shapes of weights
_ALSO = (  # of some families; a config without them has the digest that it always had, as files on disks do
    *("attention_multiplier", "clip_qkv", "embedding_multiplier", "layer_norm_eps", "no_rope_layers", "norm_epsilon"),
    *("num_experts_per_tok", "query_pre_attn_scalar", "residual_multiplier", "routed_scaling_factor"),
)
_NO_HOOK = nullcontext()
_JOINED = (torch.float16, torch.bfloat16, torch.float32)  # torch.cat makes float32 of them, which holds their values
# fingerprints that a model was found to have, and of which of its weights that is true
_verified: WeakKeyDictionary[nn.Module, tuple[Hashable, str]] = WeakKeyDictionary()


class Written(Protocol):
    """What is asked of a cache (`gistkern.GistCache`)."""

    positions: str | None

    @property
    def fingerprint(self) -> str | None:
        """Identity of the model that wrote it."""

    @property
    def is_signed(self) -> bool:
        """Whether a model wrote it."""

    @property
    def dtype(self) -> torch.dtype | None:
        """What that model computes in."""

    def shape(self) -> set[tuple[int, int, int]]:
        """Layers, key/value heads and width."""


@torch.no_grad()
def fingerprint(inner: nn.Module) -> str:
    """Hex digest of names, shapes and sampled values of the parameters (adapters and gist rows included).

    Equal weights are another model where the config rotates or normalizes otherwise (a YaRN factor switched on, say).
    """
    config: dict[str, object] = {name: getattr(inner.config, name, None) for name in _SHAPING}
    config |= {name: value for name in _ALSO if (value := getattr(inner.config, name, None)) is not None}
    windows = layer_windows(inner.config)
    if any(windows):  # left out of other models' digests, which are on disks
        config["windows"] = windows
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    values: list[torch.Tensor] = []
    modules = named_modules(inner)
    idle = [f".{adapter}." for adapter in _idle_adapters([module for _, module in modules])]
    for prefix, module in modules:
        if not module._parameters or (idle and any(adapter in f"{prefix}." for adapter in idle)):
            continue
        with on_device(module) if "_hf_hook" in vars(module) else _NO_HOOK:
            for own, parameter in module._parameters.items():
                name = f"{prefix}.{own}" if prefix else own
                if parameter is None or (idle and any(adapter in f"{name}." for adapter in idle)):
                    continue
                four_bits = parameter.dtype == torch.uint8 and is_packed(parameter)
                shape = shape_before_packing(parameter) if four_bits else tuple(parameter.shape)
                digest.update(f"{name}{shape}{parameter.dtype}".encode())
                values += [_sampled(part) for part in _plain(parameter)]
    if values:
        joined = torch.cat([v.to(values[0].device) for v in values])
        digest.update(joined.to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()


def named_modules(inner: nn.Module) -> list[tuple[str, nn.Module]]:
    """`inner.named_modules()`, without generators in generators, which take longer than a look at what they find.

    Every compression asks.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", inner)]
    while waiting:
        prefix, module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        found.append((prefix, module))
        if module._modules:
            waiting += [(f"{prefix}.{n}" if prefix else n, one) for n, one in reversed(module._modules.items())]
    return found


def _sampled(part: torch.Tensor) -> torch.Tensor:
    """Values at even distances: a view, so that of many parameters each costs one operation and all one copy."""
    count = part.numel()
    step = max(1, count // _SAMPLE)
    if not part.is_contiguous() or part.dtype not in _JOINED:
        if is_packed(part):
            return sample_before_packing(part, step).to(torch.float32)
        return part.detach().reshape(-1)[::step].to(torch.float32)
    return part.as_strided((-(-count // step),), (step,))


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the numbers: quantized weights (torchao's, say) are several behind one face."""
    if tensor.is_meta:
        return []
    if hasattr(tensor, "full_tensor"):  # FSDP2's, in parts: all ranks are here, as they are in a call
        return _plain(tensor.full_tensor())
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def adapters_in_use(inner: nn.Module) -> tuple[object, ...]:
    """Names of the active peft adapters and whether they are switched off, as the first layer has them.

    Read off one module: asked at every call.
    """
    stack: list[Any] = [inner.layers[0]]  # type: ignore[index]
    for module in stack:
        if hasattr(type(module), "active_adapters"):  # peft's wrappers, whose property it is
            return (*module.active_adapters, bool(getattr(module, "disable_adapters", False)))
        stack += [each for each in module._modules.values() if each is not None]
    return ()


def weights_in_use(inner: nn.Module) -> tuple[int, Hashable]:
    """What changes when the weights are trained, or another adapter is taken; costs no look at a value."""
    try:
        held = [module._parameters for _, module in named_modules(inner) if module._parameters]
        version = sum([one._version for own in held for one in own.values() if one is not None])
    except RuntimeError:  # inference tensors count no versions
        version = -1
    return version, adapters_in_use(inner)


def _idle_adapters(modules: Iterable[nn.Module]) -> set[str]:
    """Names of the peft adapters that are loaded and not in use: they do not change what the model computes."""
    loaded: set[str] = set()
    active: set[str] = set()
    for module in modules:
        for holder in ("lora_A", "modules_to_save"):
            loaded |= set(module._modules.get(holder) or ())  # type: ignore[arg-type]
        if hasattr(type(module), "active_adapters") and not getattr(module, "disable_adapters", False):
            active |= set(module.active_adapters)  # type: ignore[arg-type]
    return loaded - active


def check_scheme(cache: Written, handle: Reader) -> None:
    """Raise ValueError if the cache was written under another position scheme than the handle's."""
    if cache.positions not in (None, handle.positions):
        raise ValueError(
            f"the cache was written with positions={cache.positions!r}, the model is patched with "
            f"positions={handle.positions!r}: patch it with the scheme it was trained with"
        )


def check_cache(cache: Written, model: PreTrainedModel) -> None:
    """Raise ValueError unless `model` (patched) wrote `cache`."""
    handle = patched(model)
    check_scheme(cache, handle)
    _check_shape(cache, handle)
    if cache.dtype not in (None, model.dtype):
        raise ValueError(f"the cache holds {cache.dtype}, the model {model.dtype}: load the model in {cache.dtype}")
    written = cache.fingerprint
    if written is None:
        if cache.is_signed:
            raise ValueError(
                "the model that wrote the cache is gone, or its weights were changed since, so nobody can tell whether "
                "this one reads it rightly: compress the context again"
            )
        return
    in_use = weights_in_use(handle.inner)
    if _verified.get(handle.inner) == (in_use, written):
        return
    if written != fingerprint(handle.inner):
        raise ValueError("the cache was written by another model (or by other weights): compress the context again")
    _verified[handle.inner] = in_use, written


def _check_shape(cache: Written, handle: Reader) -> None:
    config = handle.inner.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = cache.shape()
    wanted = (config.num_hidden_layers, heads, width)
    if found - {wanted}:
        said = (f"{layers} layers of {heads} key/value heads of {width}" for layers, heads, width in (*found, wanted))
        raise ValueError("the cache was written by another model: it holds {}, the model has {}".format(*said))
