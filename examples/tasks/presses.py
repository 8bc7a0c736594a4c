"""Methods of kvpress that evict rows before the question is seen, in kvpress' own environment (tasks.py says which)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from tasks.engine import Answer, Engine, timed
from tasks.item import Item
from tasks.methods import budget

__all__ = ["Pressed", "make_press"]


def make_press(method: str, rows: int, tokens: int) -> Any:
    """The press that keeps `rows` of `tokens` rows: AdaKV as published, over SnapKV's scores."""
    try:
        import kvpress
    except ImportError as error:
        raise ImportError(f"{method} is kvpress', which has an environment of its own: --help says how") from error
    # it keeps int(tokens * (1 - ratio)) rows: half a row more than wanted, so that rounding takes none away
    ratio = 1 - (rows + 0.5) / tokens
    if method == "kvzip":
        return kvpress.KVzipPress(ratio)
    if method == "compactor":
        return kvpress.CompactorPress(ratio)
    if method == "expected_attention":
        return kvpress.ExpectedAttentionPress(ratio)
    # SnapKV always keeps its window: with the usual 64 tokens a smaller budget would have no row left to choose
    snapkv = kvpress.SnapKVPress(ratio, window_size=max(1, min(64, rows // 2)))
    return kvpress.AdaKVPress(snapkv) if method == "adakv" else snapkv


class Pressed:
    """Reads a context with a press; the question keeps its place behind the whole context."""

    def __init__(self, engine: Engine, method: str) -> None:
        self.engine, self.method = engine, method

    def read(self, items: Sequence[Item], ratio: float) -> list[Answer]:
        """One answer for each item, which share one context."""
        ids = self.engine.context(items[0].context)
        cache, seconds = timed(lambda: self._compress(ids, budget(len(ids), ratio)))
        rows = self._rows(cache)
        nbytes = round(rows * self.engine.row_bytes)
        return [Answer(self.engine.answer(cache, len(ids), item), len(ids), rows, nbytes, seconds) for item in items]

    @torch.inference_mode()
    def _compress(self, ids: list[int], rows: int) -> DynamicCache:
        model, cache = self.engine.model, DynamicCache()
        press = make_press(self.method, rows, len(ids))
        with press(model):
            if self.method == "kvzip":
                # it takes contexts for chat messages and never evicts the template's beginning: here there is none
                press.prefix_length = 0
                press._suffix_ids = torch.tensor([self.engine.ids("\n")])
            model.model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache)
        return cache

    def _rows(self, cache: DynamicCache) -> float:
        """Rows of a layer and head, on average: AdaKV and KVzip only hide rows, and of each head others."""
        held = hidden = heads = 0
        for layer, block in zip(cache.layers, self.engine.model.model.layers, strict=True):
            masked = getattr(block.self_attn, "masked_key_indices", None)
            held += layer.keys.shape[1] * layer.keys.shape[2]
            hidden += 0 if masked is None else len(masked[0])
            heads += layer.keys.shape[1]
        return (held - hidden) / heads
