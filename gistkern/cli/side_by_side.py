"""One context read, asked about and answered over gist rows and over a full cache, in turns."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

import gistkern
from gistkern.cache.versions import CACHE

__all__ = ["Line", "measure", "timed"]


class Line(NamedTuple):
    """A number of both sides, and the median over the rounds of what gist rows gain."""

    what: str
    unit: str
    full: float
    gist: float
    gain: float


@torch.no_grad()
def measure(
    model: Any,
    tokens: int,
    question: int,
    answer: int,
    segment_length: int | None,
    rounds: int,
    progress: Callable[[], object] = lambda: None,
) -> tuple[list[Line], int]:
    """Measure a patched model, perhaps wrapped by peft; also returns the rows of its cache.

    Time to the first token with the context unread and read, tokens per second, bytes of the caches, and on a GPU the
    peak of memory. `progress` is called after each round, and after the one that warms up.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain, device = _unpatched(base), next(base.parameters()).device
    words = min(base.gistkern_handle.gist_token_ids[0], base.config.vocab_size)
    drawn = torch.randint(0, words, (1, tokens + question), generator=torch.Generator().manual_seed(0)).to(device)
    context, asked = drawn[:, :tokens], drawn[:, tokens:]

    def gist() -> dict[str, float]:
        cache, compressing = timed(lambda: gistkern.compress(base, context, segment_length=segment_length), device)
        copied = cache.clone()
        token, asking = timed(lambda: _step(base, asked, cache), device)
        nbytes = cache.nbytes
        _, decoding = timed(lambda: _decode(base, token, cache, answer), device)
        _, read = timed(lambda: _step(base, asked, copied), device)
        rows = int(cache.gist_rows.max())
        return {"unread": compressing + asking, "read": read, "speed": answer / decoding, "bytes": nbytes, "rows": rows}

    def full() -> dict[str, float]:
        cache: Any = DynamicCache()
        token, unread = timed(lambda: _step(plain, drawn, cache), device)
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        _, decoding = timed(lambda: _decode(plain, token, cache, answer), device)
        cache.crop(-(question + answer))
        _, read = timed(lambda: _step(plain, asked, cache), device)
        return {"unread": unread, "read": read, "speed": answer / decoding, "bytes": nbytes}

    sides: dict[Callable[[], dict[str, float]], list[dict[str, float]]] = {full: [], gist: []}
    for number in range(rounds + 1):
        for side in (full, gist) if number % 2 else (gist, full):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the gist rows were never trained|.*past_key_values. is deprecated")
                found = _with_peak(side, device)
            if number:  # the first warms up
                sides[side].append(found)
        progress()
    return _lines(sides[full], sides[gist]), int(sides[gist][0]["rows"])


def _lines(full: list[dict[str, float]], gist: list[dict[str, float]]) -> list[Line]:
    names = {
        "unread": ("first token, context unread", "seconds"),
        "read": ("first token, context read before", "seconds"),
        "speed": ("tokens decoded per second", "per second"),
        "bytes": ("cache, question included", "bytes"),
        "peak": ("peak of memory, weights included", "bytes"),
    }
    lines = []
    for name, (what, unit) in names.items():
        if name not in full[0]:
            continue
        ours, others = [one[name] for one in gist], [one[name] for one in full]
        gains = [a / b if unit == "per second" else b / a for a, b in zip(ours, others, strict=True)]
        lines.append(Line(what, unit, statistics.median(others), statistics.median(ours), statistics.median(gains)))
    return lines


def _unpatched(model: Any) -> Any:
    """The model as it was before patching, with the same tensors."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, kept)
    plain.gistkern_handle.unpatch()
    return plain


def _step(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The most probable token ``[1, 1]`` behind `ids`."""
    return model(ids, logits_to_keep=1, **{CACHE: cache}).logits[:, -1:].argmax(-1)


def _decode(model: Any, token: torch.Tensor, cache: Any, count: int) -> None:
    for _ in range(count):
        token = _step(model, token, cache).clamp(max=model.config.vocab_size - 1)


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call returns and the seconds it takes, the device's work included."""
    _wait(device)
    begin = time.perf_counter()
    out = call()
    _wait(device)
    return out, time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _with_peak(side: Callable[[], dict[str, float]], device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return side()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return side() | {"peak": float(torch.cuda.max_memory_allocated(device))}
