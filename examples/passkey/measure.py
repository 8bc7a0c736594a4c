"""Gist cache beside full cache with the same weights on one machine: time, and the memory that is needed meanwhile.

Both sides are `generate` on the same context and question: behind `compress`, and on the unpatched model with the cache
that transformers makes. Times are medians of rounds in which the sides alternate. Memory is the growth of the resident
set's peak, in a process of its own that hands freed memory back; on Linux only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from gistkern import compress
from passkey.niah import Sample
from passkey.trained import Trained, open_trained

__all__ = ["answered", "side_by_side"]

ROUNDS = 3
NEW_TOKENS = 64
# glibc would keep freed memory and hand it out again, which the resident set does not show
FREED_MEMORY_GOES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": str(1 << 24),
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def side_by_side(trained: Trained, sample: Sample) -> dict[str, Any]:
    """Time to the first token (compressing included), decoding speed and peak memory, with gist rows and in full."""
    context, question = (
        trained.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sample.context, sample.question)
    )
    context = [*trained.start, *context]
    full = open_trained(trained.checkpoint, trained.source)
    full.handle.unpatch()
    found: dict[str, list[dict[str, Any]]] = {"gist": [], "full": []}
    for _ in range(ROUNDS):
        found["gist"].append(answered(trained, "gist", context, question))
        found["full"].append(answered(full, "full", context, question))
    names = "time_to_first_token_s", "decode_tokens_per_s"
    times = {
        side: {name: statistics.median(one[name] for one in all_) for name in names} for side, all_ in found.items()
    }
    return {
        "tokens": sample.tokens,
        "runs": ROUNDS,
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        **{side: times[side] | peaks for side, peaks in _peaks(trained, context, question).items()},
    }


def answered(trained: Trained, side: str, context: Sequence[int], question: Sequence[int]) -> dict[str, Any]:
    """`NEW_TOKENS` tokens said to a question: when they came and how memory grew, before the first and after it."""
    watch = _Watch()
    ids, cache = [*context, *question], {}
    if side == "gist":
        ids, cache = list(question), {"past_key_values": compress(trained.model, list(context), **trained.compression)}
    prompt = torch.tensor([ids], device=trained.model.device)
    trained.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        streamer=watch,
        **cache,
    )
    return watch.found()


class _Watch(BaseStreamer):
    """Looks at clock and memory when it is made, at the first token and at the end."""

    def __init__(self) -> None:
        self.calls, self.times, self.growth = 0, [time.perf_counter()], []
        self.before = _reset_peak()

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every token."""
        self.calls += 1
        if self.calls == 2:  # the first token
            self._look()

    def end(self) -> None:
        """Called behind the last one."""
        self._look()

    def _look(self) -> None:
        self.times.append(time.perf_counter())
        # the resident set is counted lazily by the kernel: growth below a few hundred kilobytes is noise
        self.growth.append(None if self.before is None else max(0, _status("VmHWM") - self.before))
        self.before = _reset_peak()

    def found(self) -> dict[str, Any]:
        """What a report says of it."""
        begin, first, last = self.times
        speed = (NEW_TOKENS - 1) / (last - first)
        peaks = dict(zip(("prefill_peak_bytes", "decode_peak_bytes"), self.growth, strict=True))
        return {"time_to_first_token_s": first - begin, "decode_tokens_per_s": speed, **peaks}


def _peaks(trained: Trained, context: Sequence[int], question: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Growth of the peak resident set until the first token and after it, for both sides; None off Linux."""
    done = subprocess.run(
        [sys.executable, "-m", "passkey.measure"],
        cwd=Path(__file__).parents[1],
        input=json.dumps([str(trained.checkpoint.resolve()), trained.source, context, question]),
        capture_output=True,
        text=True,
        env=os.environ | FREED_MEMORY_GOES_BACK,
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _measure_in_this_process() -> None:
    checkpoint, source, context, question = json.load(sys.stdin)
    torch.set_num_threads(1)
    trained, found = open_trained(checkpoint, source), {}
    for side in ("gist", "full"):
        if side == "full":
            trained.handle.unpatch()
        answered(trained, side, context, question)  # threads, kernels and what is kept for the next call of that size
        measured = answered(trained, side, context, question)
        found[side] = {name: value for name, value in measured.items() if name.endswith("_bytes")}
    print(json.dumps(found))


def _reset_peak() -> int | None:
    """Start a new peak at the current resident set, which is returned; None where the kernel has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    _measure_in_this_process()
