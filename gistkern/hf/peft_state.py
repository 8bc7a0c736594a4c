"""What peft has done to a model, read from its attributes: peft itself need not be installed."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["active_adapters", "adapter_parameters", "has_adapters", "trains_biases"]


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


def adapter_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that adapters brought."""
    found: set[int] = set()
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module | nn.ParameterDict):
                found |= {id(parameter) for parameter in part.parameters()}
    return found


def trains_biases(model: Any) -> bool:
    """Whether an adapter trains the model's own biases (LoRA's ``bias="all"``)."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "bias", "none") != "none" for config in configs.values())
