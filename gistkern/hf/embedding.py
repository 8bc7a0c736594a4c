"""The learned gist vectors, as a small module of their own inside the patched model.

Kept apart from the model's embedding matrix so that only these rows train, `unpatch` restores the model bit
for bit, and checkpoints do not hold the whole matrix twice.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["GistEmbedding"]


class GistEmbedding(nn.Module):
    """`count` rows of the model's hidden size, and the settings they were trained with (see `GistHandle`).

    The settings are a buffer, so that they travel wherever the rows do: model checkpoints and adapters.
    New rows are drawn around the mean of `existing` (the model's embedding matrix) with its spread, from
    a fixed seed, so that two fresh patches of one model agree.
    """

    def __init__(self, existing: torch.Tensor, count: int, settings: list[int]) -> None:
        super().__init__()
        rows = existing.detach().float()
        noise = torch.randn(count, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows.device)
        start = rows.mean(0) + rows.std(0) * noise
        self.weight = nn.Parameter(start.to(existing.dtype))
        self.register_buffer("settings", torch.tensor(settings, device=existing.device))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Vectors ``[..., hidden]`` of gist indices (0 is the first gist token)."""
        return nn.functional.embedding(index, self.weight)
