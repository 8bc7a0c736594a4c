"""One question about the demo's page, answered from gist rows, from a full cache, and without the page."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from gistkern import demo
from gistkern.cache.versions import CACHE
from gistkern.cli.side_by_side import timed
from gistkern.hf.ask import answer, compressed
from gistkern.hf.texts import context_ids, text_ids

__all__ = ["Way", "three_ways"]


class Way(NamedTuple):
    """What is kept of the page, what that takes, and what is answered from it."""

    kept: str
    rows: int
    nbytes: int
    reading: float  # seconds, once for a page
    answering: float  # seconds, for each question
    said: str


@torch.no_grad()
def three_ways(
    name: str, key: str, device: str, step: Callable[[str], AbstractContextManager[None]]
) -> tuple[list[Way], int]:
    """Load, read and answer, all in `device`; what is done is said by `step`. Also returns the page's tokens.

    As many tokens are decoded as the key has, for models that never learned to stop.
    """
    with step(f"loading {name}"):
        model, tokenizer, _ = demo.load(name)
        model = model.to(device)
    page = demo.page(key)
    ids, asked = context_ids(tokenizer, page), text_ids(tokenizer, demo.question(name))
    count = len(text_ids(tokenizer, key))
    place = next(model.parameters()).device
    with step("compressing the page, and asking"):
        compressed(model, tokenizer, demo.page()[:99], None)  # once untimed: weights come from disk when they are used
        cache, reading = timed(lambda: compressed(model, tokenizer, page, None), place)
        rows, nbytes = int(cache.gist_rows.max()), cache.nbytes
        said, answering = timed(
            lambda: answer(model, tokenizer, [asked], cache, False, {"max_new_tokens": count}), place
        )
    ways = [Way("gist rows", rows, nbytes, reading, answering, tokenizer.decode(said[0]))]
    with step("the same without gist rows"):
        model = demo.plain(name).to(device)
        model(torch.tensor([asked], device=place))
        for kept, read in (("full cache", ids), ("no context", [])):
            ways.append(_without_gist_rows(model, tokenizer, kept, read, asked, count))
    return ways, len(ids)


def _without_gist_rows(model: Any, tokenizer: Any, kept: str, read: list[int], asked: list[int], count: int) -> Way:
    """By transformers alone: the page's tokens in a cache of their own, then the question behind them."""
    cache: Any = DynamicCache()
    whole = torch.tensor([[*read, *asked]], device=model.device)
    rows, nbytes, reading = 0, 0, 0.0
    if read:
        context = whole[:, : len(read)]
        _, reading = timed(lambda: model(context, logits_to_keep=1, **{CACHE: cache}), model.device)
        rows, nbytes = len(read), sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    how = {"max_new_tokens": count, "do_sample": False, "temperature": None, "top_p": None, "pad_token_id": 0}
    mask = torch.ones_like(whole)
    said, answering = timed(
        lambda: model.generate(whole, attention_mask=mask, past_key_values=cache, **how), model.device
    )
    return Way(kept, rows, nbytes, reading, answering, tokenizer.decode(said[0, whole.shape[1] :]))
