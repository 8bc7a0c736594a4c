"""What peft has done to a model, read from its attributes: peft itself need not be installed."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["LOADED_UNPATCHED", "active_adapters", "adapters_with_rows", "has_adapters"]

LOADED_UNPATCHED = (
    "the adapter holds gist rows, but was loaded on a model that was not patched, which drops them "
    "(AutoPeftModelForCausalLM does so): patch the model before wrapping it with peft or loading an adapter, "
    "patch_llama(base, ...) with the settings of the training (gistkern.json beside the adapter), then "
    "PeftModel.from_pretrained(base, folder)"
)


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer is wrapped by an adapter, in use or not."""
    return any(hasattr(module, "adapter_layer_names") for module in model.modules())


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters in use; none while they are disabled. All layers of a model agree."""
    for module in model.modules():
        if hasattr(module, "adapter_layer_names") and not hasattr(module, "modules_to_save"):
            layer: Any = module
            active = [] if layer.disable_adapters else layer.active_adapter
            return [active] if isinstance(active, str) else list(active)
    return []


def adapters_with_rows(model: Any) -> list[str]:
    """Names of the loaded adapters whose configs save gist rows (``modules_to_save``, by whatever path)."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    named = {name: getattr(config, "modules_to_save", None) or () for name, config in configs.items()}
    return [
        name
        for name, modules in named.items()
        if any(one.split(".")[-1] == "gist_embeddings" for one in ([modules] if isinstance(modules, str) else modules))
    ]
