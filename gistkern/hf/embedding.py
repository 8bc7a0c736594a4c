"""The learned gist vectors, as a small module of their own inside the patched model.

Kept apart from the model's embedding matrix so that only these rows train, `unpatch` restores the model bit
for bit, and checkpoints do not hold the whole matrix twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["GistEmbedding", "embedded_sample", "fresh_rows", "rows_in_use"]

_SAMPLE = 4096  # words that tell a vocabulary's mean and spread


class GistEmbedding(nn.Module):
    """Rows ``[count, hidden]``, and the settings they were trained with (`GistSettings.numbers`).

    The settings are a buffer, so that they travel wherever the rows do: model checkpoints and adapters.
    """

    settings: torch.Tensor

    def __init__(self, rows: torch.Tensor, settings: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)
        self.register_buffer("settings", torch.tensor(settings, device=rows.device))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Vectors ``[..., hidden]`` of gist indices (0 is the first gist token)."""
        return nn.functional.embedding(index, self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As torch does, but rows of another size are an error that says where the right settings stand."""
        found = state_dict.get(f"{prefix}weight")
        if torch.is_tensor(found) and found.shape != self.weight.shape:
            errors: list[str] = args[-1]
            errors.append(
                f"the gist rows to be loaded are {tuple(found.shape)}, the model is patched for "
                f"{tuple(self.weight.shape)}: patch it with the num_gist_tokens and num_segment_gist_tokens of the "
                "training, which stand in gistkern.json beside an adapter and in config.json of a checkpoint"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


def rows_in_use(module: nn.Module) -> GistEmbedding:
    """Of the gist rows that peft's ``modules_to_save`` holds, one copy per adapter, those a call reads now."""
    held: Any = module
    copies = getattr(held, "modules_to_save", None)
    if copies is None:
        return held
    active = held.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if held.disable_adapters or not names or any(name not in copies for name in names):
        return held.original_module
    return copies[names[0]]


@torch.no_grad()
def embedded_sample(vocabulary: nn.Module, size: int) -> torch.Tensor:
    """Vectors ``[up to 4096, hidden]`` of ids spread over the vocabulary, made by the embedding itself.

    Its weights are never read: they may be quantized, or lie on the disk until the module is called. A model that has
    none at all (the meta device, where parameters are counted) gives vectors that are there as little.
    """
    weight = getattr(vocabulary, "weight", None)
    device = weight.device if torch.is_tensor(weight) and not weight.is_meta else torch.device("cpu")
    return vocabulary(torch.arange(0, size, -(-size // _SAMPLE), device=device)).detach()


def fresh_rows(words: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows around the mean of `words` with their spread, as they lie.

    The seed is fixed, so that two fresh patches of one model agree.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(count, words.shape[1], generator=generator, device="cpu", dtype=torch.float32)
    wide = words.float()
    return (wide.mean(0) + wide.std(0) * noise.to(words.device)).to(words.dtype)
