"""The patched model that a cache is held to, found through whatever wraps it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

__all__ = ["ATTRIBUTE", "LOADED_UNPATCHED", "Reader", "adapters_with_rows", "patched", "vocabulary_size"]

ATTRIBUTE = "gistkern_handle"
_WRAPPERS = ("get_base_model", "_orig_mod", "module")  # peft's, torch.compile's, DDP's and FSDP's

LOADED_UNPATCHED = (
    "the adapter holds gist rows, but was loaded on a model that was not patched, which drops them "
    "(AutoPeftModelForCausalLM does so): load it by model, tokenizer, handle = gistkern.load(folder), or patch the "
    "base before PeftModel.from_pretrained(base, folder), with the settings of the training"
)


class Reader(Protocol):
    """What a cache asks of a patched model's handle (`gistkern.GistHandle`)."""

    inner: Any
    positions: str

    def fingerprint(self) -> str:
        """Digest of the weights in use."""

    def weights_in_use(self) -> tuple[int, Hashable]:
        """What changes when the weights are trained, or another adapter is taken."""

    def adapters_in_use(self) -> Hashable:
        """What changes when another adapter is taken."""


def patched(model: Any) -> Reader:
    """The handle of a patched model, also seen through wrappers (peft, DDP, FSDP, torch.compile).

    Raises
    ------
    ValueError
        If the model is not patched, or wrapped so that gist tokens would not reach the patch.
    """
    base = model
    while (step := next((name for name in _WRAPPERS if hasattr(base, name)), None)) is not None:
        if vars(base).get("_peft_config"):  # of prompt learning only
            raise ValueError(
                f"{type(base.active_peft_config).__name__} and gist tokens do not go together: peft embeds the ids "
                "itself and knows no gist tokens. Train the gist rows alone, or with LoRA"
            )
        base = base.get_base_model() if step == "get_base_model" else getattr(base, step)
    handle = getattr(base, ATTRIBUTE, None)
    if handle is not None:
        return handle
    if adapters_with_rows(base):
        raise ValueError(LOADED_UNPATCHED)
    if hasattr(getattr(base, "model", None), ATTRIBUTE):
        raise ValueError("only the model's inner model is patched: pass that one, or patch the whole model instead")
    raise ValueError(
        "the model knows no gist tokens: load a trained one by gistkern.load(folder), or call gistkern.patch(model) to "
        "train one"
    )


def adapters_with_rows(model: Any) -> list[str]:
    """Names of the loaded adapters whose configs save gist rows (``modules_to_save``, by whatever path)."""
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    named = {name: getattr(config, "modules_to_save", None) or () for name, config in configs.items()}
    return [
        name
        for name, modules in named.items()
        if any(one.split(".")[-1] == "gist_embeddings" for one in ([modules] if isinstance(modules, str) else modules))
    ]


def vocabulary_size(vocabulary: Any, config: Any) -> int:
    """Rows of a model's embedding, whatever it is wrapped in."""
    size = getattr(getattr(vocabulary, "base_layer", vocabulary), "num_embeddings", None)
    return config.vocab_size if size is None else size
