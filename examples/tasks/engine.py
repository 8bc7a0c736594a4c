"""A model that reads and answers greedily, the same way for every method: what differs is what its cache holds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tasks.item import Item

__all__ = ["Answer", "Engine", "Method", "timed"]


@dataclass(frozen=True)
class Answer:
    """What was said, and what it took.

    `tokens` are those of the context, `rows` the rows of keys and values that were left of it (a layer and head),
    `nbytes` their bytes in all layers, `seconds` the processor's for reading and compressing the context.
    """

    said: str
    tokens: int
    rows: float
    nbytes: int
    seconds: float


class Method(Protocol):
    """A way to read: `read` answers items that share one context, at a ratio of tokens to rows."""

    def read(self, items: Sequence[Item], ratio: float) -> list[Answer]:
        """One answer for each item."""


@dataclass
class Engine:
    """A model without gist tokens, and its tokenizer."""

    model: Any
    tokenizer: Any
    start: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.tokenizer("")["input_ids"]  # what the tokenizer puts in front of every text

    @classmethod
    def load(cls, folder: str, **from_pretrained: Any) -> Engine:
        """The model and the tokenizer in a folder."""
        model = AutoModelForCausalLM.from_pretrained(folder, **from_pretrained).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def context(self, text: str) -> list[int]:
        """Token ids of a context."""
        return [*self.start, *self.ids(text)]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of keys and values in all layers."""
        config = self.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * config.num_key_value_heads * size * self.model.dtype.itemsize

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> DynamicCache:
        """The cache of some tokens."""
        cache = DynamicCache()
        if ids:
            self.model.base_model(input_ids=self._tensor(ids), **self._holding(cache))
        return cache

    @torch.inference_mode()
    def answer(self, cache: DynamicCache, place: int, item: Item) -> str:
        """The greedy answer to an item, whose tail is read at position `place` on; the cache is left as it was."""
        held = cache.get_seq_length()
        ids, said, text = self.ids(item.tail), list[int](), ""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        while len(said) < item.new_tokens:
            places = torch.arange(place, place + len(ids), device=self.model.device)[None]
            out = self.model(self._tensor(ids), position_ids=places, logits_to_keep=1, **self._holding(cache))
            place += len(ids)
            ids = [int(out.logits[0, -1].argmax())]
            if ids[0] in ends:
                break
            said += ids
            text = self.tokenizer.decode(said)
            if "\n" in text.lstrip():
                break
        for layer in cache.layers:  # `crop` takes other numbers in other versions
            layer.keys, layer.values = layer.keys[:, :, :held], layer.values[:, :, :held]
        return first_line(text)

    def _holding(self, cache: DynamicCache) -> dict[str, DynamicCache]:
        """The cache under the name that the model's version of transformers has for it."""
        named = "cache" in inspect.signature(self.model.forward).parameters
        return {"cache" if named else "past_key_values": cache}

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)


def first_line(text: str) -> str:
    """An answer without what follows its line."""
    return (text.strip().splitlines() or [""])[0].strip()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What some work gives, and the processor's seconds for it."""
    begin = time.process_time()
    return work(), time.process_time() - begin
