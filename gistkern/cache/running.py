"""A model call under way, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gistkern.cache.plan import CallPlan
from gistkern.cache.pool import PoolIntervals
from gistkern.cache.tokens_read import UNKNOWN

__all__ = ["UNPATCHED", "ModelCall", "check_whole"]

UNPATCHED = (
    "a GistCache works with a patched model only: load a trained one by gistkern.load(folder), or call "
    "gistkern.patch(model) first"
)


@dataclass
class ModelCall:
    """What a cache keeps from the start of a model call to its end.

    Parameters
    ----------
    plan : CallPlan
        Of the call, for all layers.
    ids : Tensor or None
        int64 ``[B, N]``: what it brings; None for embeddings.
    intervals : PoolIntervals or None
        Of rows that are read where they stand.
    touched : bool
        Whether a layer has stored rows of it: until the last one has, layers are ahead of others.
    failed : bool
        Whether it ended in an error.
    """

    plan: CallPlan
    ids: torch.Tensor | None
    intervals: PoolIntervals | None
    touched: bool = False
    failed: bool = False

    def columns(self) -> torch.Tensor:
        """`ids`, which are unknown of embeddings."""
        if self.ids is not None:
            return self.ids
        layout = self.plan.layout
        return torch.full((layout.batch_size, layout.num_rows), UNKNOWN, device=layout.device)


def check_whole(call: ModelCall | None) -> None:
    """Raise RuntimeError if a model call, perhaps one that ended early, has updated some layers and not all."""
    if call is not None and call.touched:
        raise RuntimeError(
            "an earlier model call failed half way through the layers and left this cache inconsistent: "
            "go on from a clone made before it, or compress again"
        )
