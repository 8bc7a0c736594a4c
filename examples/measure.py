"""Gist cache against full cache, side by side on one machine: time, memory, bytes.

Times are medians of alternating rounds in this process (throughput.py); memory is the growth of the resident
set's peak in a process of its own for each of the four measurements, since a peak cannot be taken back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from passkey.niah import Sample
from passkey.trained import Trained, open_trained
from throughput import (
    NEW_TOKENS,
    QUESTIONS,
    ROUNDS,
    Side,
    decode_by_batch,
    full_side,
    gist_side,
    paying_questions,
    rounds,
)

__all__ = ["side_by_side"]

# glibc would keep freed memory and hand it out again, which the resident set does not show
FREED_MEMORY_GOES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": str(1 << 24),
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def side_by_side(trained: Trained, sample: Sample, batches: Sequence[int] = ()) -> dict[str, Any]:
    """Time to first token, decode speed, reuse and peak memory with gist rows and with the full-context cache.

    Both read the same context with the same weights; the full cache is transformers' own DynamicCache on the
    unpatched model. The time to the first token includes compressing. Decoding of `batches` larger than one is
    measured on request: it is what takes longest.
    """
    compression = trained.compression
    context, question = (
        torch.tensor([trained.tokenizer(text, add_special_tokens=False)["input_ids"]])
        for text in (sample.context, sample.question)
    )
    full = open_trained(trained.checkpoint, trained.source)
    full.handle.unpatch()
    sides = {"gist": gist_side(trained.model, context, compression), "full": full_side(full.model, context)}
    times = rounds(sides, question)
    return {
        "tokens": sample.tokens,
        "runs": ROUNDS,
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        **{name: {**measured, **_peaks(trained, name, context, question)} for name, measured in times.items()},
        "questions": QUESTIONS,
        "paying_questions": paying_questions(times["gist"], times["full"]),
        "decode_by_batch": decode_by_batch(sides, question, batches) if batches else [],
    }


def _peaks(trained: Trained, which: str, context: torch.Tensor, question: torch.Tensor) -> dict[str, Any]:
    """Growth of the peak resident set in prefill and, from what prefill left, in decode; None off Linux."""
    request = {
        "checkpoint": str(trained.checkpoint),
        "source": trained.source,
        "which": which,
        "context": context.tolist(),
        "question": question.tolist(),
        "compression": trained.compression,
    }
    command = [sys.executable, str(Path(__file__))]
    environment = os.environ | FREED_MEMORY_GOES_BACK
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout)


def _measure_in_this_process() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    trained = open_trained(request["checkpoint"], request["source"])
    model = trained.model
    context, question = torch.tensor(request["context"]), torch.tensor(request["question"])
    if request["which"] == "full":
        trained.handle.unpatch()

    def side(ids: torch.Tensor) -> Side:
        return gist_side(model, ids, request["compression"]) if request["which"] == "gist" else full_side(model, ids)

    with torch.no_grad():
        side(context).prefill()  # threads, kernels and what is kept for the next call of that size
        whole = side(context)
        before = _reset_peak()
        cache = whole.prefill()
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
