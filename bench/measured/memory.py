"""Peak memory of one call above its inputs; on a CPU in a process of its own, whose peak cannot be taken back.

    python -m bench.measured.memory '["attention", "512/8", 4096, "2 heads, D 64", "both", "cpu"]' "sdpa dense"

What a baseline plans and keeps (a mask) counts, what it needs only while it plans does not, and neither does what only
a first call needs (FlexAttention compiles). On CPU it is the growth of the resident set (Linux), on a GPU that of
torch's allocator.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
# glibc keeps freed memory and hands it out again, which the resident set does not show: every block of 64 KiB or more
# gets pages of its own, and they go back when it is freed
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": str(1 << 24), "MALLOC_TRIM_THRESHOLD_": "0"}


def peak_bytes(case: Sequence[Any], name: str) -> int | str:
    """Peak bytes of a call, or why they are not known.

    `case` is ``("attention", ...)`` with the arguments of `attention_plan`, or ``("compressing", model, tokens,
    device)``; `name` is the call's.
    """
    if case[-1] == "cuda":
        return _measure(case, name)
    command = [sys.executable, "-m", "bench.measured.memory", json.dumps(list(case)), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(case: Sequence[Any], name: str) -> int | str:
    what, *arguments = case
    if what == "compressing":
        from bench.measured.models import compressing_case  # brings transformers

        model, tokens, device = arguments
        call = compressing_case(model, tokens, 512, 512 if device == "cpu" else 4096, device).calls[name]
        return _peak(lambda: call, device)
    from bench.measured.attention import attention_plan

    plan = attention_plan(name, *arguments)
    return plan if isinstance(plan, str) else _peak(plan, arguments[-1])


def _peak(plan: Callable[[], Call], device: str) -> int | str:
    plan()()  # threads, kernels and what is compiled
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        call = plan()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        try:
            before = start_peak()
            call = plan()
            Path("/proc/self/clear_refs").write_text("5")
            result = call()
            peak = resident("VmHWM") - before
        except (OSError, AttributeError):
            return "this system does not tell a process its peak"
    held = _bytes(result)
    if peak < held:
        raise RuntimeError(f"a peak of {peak} bytes was read while the result alone holds {held}")
    return peak


def start_peak() -> int:
    """Give freed memory back, begin a new peak, and return the bytes it begins at; OSError where there is no such."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def _bytes(result: Any) -> int:
    if isinstance(result, tuple):
        return sum(tensor.nbytes for tensor in result)
    from bench.measured.models import cache_bytes

    return cache_bytes(result)


def resident(field: str) -> int:
    """Bytes of this process's resident set (Linux): ``"VmRSS"`` now, ``"VmHWM"`` at the peak since `start_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_measure(json.loads(sys.argv[1]), sys.argv[2])))
