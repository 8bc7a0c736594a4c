"""Gist cache against full cache, side by side on one machine: time, memory, bytes.

Times are medians of alternating runs in this process; memory is the growth of the resident set's peak in a
process of its own for each of the four measurements, since a peak cannot be taken back.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaForCausalLM

from checkpoints import load_model
from gistkern import compress
from niah import Sample

__all__ = ["side_by_side"]

RUNS = 3
NEW_TOKENS = 64


def side_by_side(checkpoint: Path, tokenizer: Tokenizer, sample: Sample, segments: dict[str, int]) -> dict[str, Any]:
    """Time to first token, decode speed and peak memory with gist rows and with the full-context cache.

    Both read the same context with the same weights; the full cache is transformers' own DynamicCache on the
    unpatched model. The time to the first token includes compressing.
    """
    context, question = (
        torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
        for text in (sample.context, sample.question)
    )
    gist_model, _, _ = load_model(checkpoint)
    full_model, handle, _ = load_model(checkpoint)
    handle.unpatch()
    times: dict[str, list[tuple[float, float]]] = {"gist": [], "full": []}
    for _ in range(RUNS):
        times["gist"].append(_timed(gist_model, _gist_prefill(gist_model, context, segments), question))
        times["full"].append(_timed(full_model, _full_prefill(full_model, context), question))
    found: dict[str, Any] = {
        "tokens": sample.tokens,
        "runs": RUNS,
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
    }
    for name, pairs in times.items():
        found[name] = {
            "time_to_first_token_s": statistics.median(first for first, _ in pairs),
            "decode_tokens_per_s": statistics.median(speed for _, speed in pairs),
            **_peaks(checkpoint, name, context, question, segments),
        }
    return found


def _gist_prefill(model: LlamaForCausalLM, context: torch.Tensor, segments: dict[str, int]) -> Callable[[], Any]:
    return lambda: compress(model, context, **segments)


def _full_prefill(model: LlamaForCausalLM, context: torch.Tensor) -> Callable[[], Any]:
    def prefill() -> DynamicCache:
        return model.model(context, past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values

    return prefill


@torch.no_grad()
def _timed(model: LlamaForCausalLM, prefill: Callable[[], Any], question: torch.Tensor) -> tuple[float, float]:
    """(seconds to the first token, tokens per second after it), by the same greedy loop for both caches."""
    model.eval()
    begin = time.perf_counter()
    cache = prefill()
    token = model(question, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(NEW_TOKENS):
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    return first - begin, NEW_TOKENS / (time.perf_counter() - first)


def _peaks(
    checkpoint: Path, which: str, context: torch.Tensor, question: torch.Tensor, segments: dict[str, int]
) -> dict[str, Any]:
    """Growth of the peak resident set in prefill and, from what prefill left, in decode; None off Linux."""
    request = {
        "checkpoint": str(checkpoint),
        "which": which,
        "context": context.tolist(),
        "question": question.tolist(),
        "segments": segments,
    }
    command = [sys.executable, str(Path(__file__))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _measure_in_this_process() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    model, handle, _ = load_model(Path(request["checkpoint"]))
    model.eval()
    context, question = torch.tensor(request["context"]), torch.tensor(request["question"])
    segments = request["segments"]
    if request["which"] == "gist":
        prefill = _gist_prefill(model, context, segments)
        compress(model, context[:, :100], **segments)  # allocators and kernels warm up first
    else:
        handle.unpatch()
        prefill = _full_prefill(model, context)
        model(context[:, :100])
    with torch.no_grad():
        before = _reset_peak()
        cache = prefill()
        after_prefill = _peak()
        kept = _reset_peak()
        for _ in range(NEW_TOKENS):
            question = model(question, past_key_values=cache).logits[:, -1:].argmax(-1)
        after_decode = _peak()
    known = before is not None
    # the resident set is counted lazily by the kernel: growth below a few hundred kilobytes is noise
    peaks = {
        "prefill_peak_bytes": max(0, after_prefill - before) if known else None,
        "decode_peak_bytes": max(0, after_decode - kept) if known else None,
    }
    print(json.dumps(peaks))


def _peak() -> int | None:
    """Peak resident set in bytes since the last reset (Linux)."""
    return _status("VmHWM")


def _reset_peak() -> int | None:
    """Start a new peak at the current resident set, which is returned; None where the kernel has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    _measure_in_this_process()
