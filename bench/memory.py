"""Peak memory of one call above its inputs, in a process of its own: a peak cannot be taken back.

    python -m bench.memory '["attention", "512/8", 4096, "2 heads, D 64", "both", "cpu"]' "sdpa dense"

What a baseline plans and keeps (a mask) counts, what it needs only while it plans does not. On CPU it is the growth of
the resident set (Linux), on a GPU that of torch's allocator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["peak_bytes"]

Call = Callable[[], Any]


def peak_bytes(case: Sequence[Any], name: str) -> int | str:
    """Peak bytes of a call, or why they are not known.

    `case` is ``("attention", ...)`` with the arguments of `attention_plan`, or ``("compressing", ...)`` with those of
    `compressing_case`; `name` the call's.
    """
    command = [sys.executable, "-m", "bench.memory", json.dumps(list(case)), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(case: Sequence[Any], name: str) -> int | str:
    what, *arguments = case
    if what == "compressing":
        from bench.models import compressing_case  # brings transformers

        small, size, device = arguments[0], arguments[1], arguments[2]
        compressing_case(small, 600, device).calls[name]()  # allocators, threads and kernels warm up
        whole = compressing_case(small, size, device)
        return _peak(lambda: whole.calls[name], device)
    from bench.attention import attention_plan

    layout, rows, heads, passes, device = arguments
    warm = attention_plan(name, layout, 600, heads, passes, device)
    if isinstance(warm, str):
        return warm
    warm()()
    plan = attention_plan(name, layout, rows, heads, passes, device)
    return plan if isinstance(plan, str) else _peak(plan, device)


def _peak(plan: Callable[[], Call], device: str) -> int | str:
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        call = plan()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    try:
        before = _status("VmRSS")
        call = plan()
        Path("/proc/self/clear_refs").write_text("5")
        result = call()
        del result
        return max(0, _status("VmHWM") - before)
    except OSError:
        return "this system does not tell a process its peak"


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_measure(json.loads(sys.argv[1]), sys.argv[2])))
