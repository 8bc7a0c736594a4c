"""``python bench/measured/cached_step.py BEFORE AFTER``: a cached decode step and `compress`, of two checkouts.

Each checkout has a process of its own, and they are asked in turns, one waiting while the other works, so that what
else the machine does falls on both. Printed are medians: milliseconds of processor time, the ratio of a round, Python
and C calls of one call, operations on tensors, and the bytes that copying operations wrote in it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import gistkern

ROUNDS = 21
# hidden size, layers, query heads, key/value heads
MODELS = {"2 layers of 64": (64, 2, 4, 2), "SmolLM2-135M, 6 of its layers": (576, 6, 9, 3)}
COPIES = ("cat", "copy_", "clone", "index", "gather", "index_select", "_to_copy")
QUESTION, STEPS = 256, 40


class Count(TorchDispatchMode):
    """Tensor operations within the block, and the bytes that copying ones wrote."""

    operations = copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        self.copied += out.nbytes if function._schema.name.removeprefix("aten::") in COPIES else 0
        return out


@torch.no_grad()
def work(hidden: int, layers: int, heads: int, kv_heads: int) -> None:
    """Do what each line of the input names: a step behind 10 gist rows and a question, or compressing 2,048 tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 2 * hidden, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads)
    model = LlamaForCausalLM(config).eval()
    gistkern.patch_llama(model, num_gist_tokens=10)
    context, question, long = (torch.randint(0, 200, (1, tokens)) for tokens in (512, QUESTION, 2048))
    token, compressed = question[:, :1], gistkern.compress(model, context)
    for line in sys.stdin:
        cache = compressed.clone()
        model(question, past_key_values=cache)
        model(token, past_key_values=cache)  # of one row more: the step that finds no room has been
        calls: dict[str, Callable[[], Any]] = {
            "step": lambda cache=cache: model(token, past_key_values=cache),
            "compress": lambda: gistkern.compress(model, long, segment_length=128),
        }
        what, *counts = line.split()
        times = STEPS if what == "step" else 1
        print(json.dumps(counted(calls[what]) if counts else {"ms": timed(calls[what], times)}), flush=True)


def timed(call: Callable[[], Any], times: int) -> float:
    """Median of so many calls, in milliseconds of processor time."""
    spent = []
    for _ in range(times):
        begin = time.process_time()
        call()
        spent.append(1e3 * (time.process_time() - begin))
    return statistics.median(spent)


def counted(call: Callable[[], Any]) -> dict[str, int]:
    """What one call does."""
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    call()
    sys.setprofile(None)
    with Count() as count:
        call()
    return {"Python and C calls": calls, "tensor operations": count.operations, "bytes copied": count.copied}


def ask(worker: subprocess.Popen, what: str) -> dict[str, float]:
    """What a process answers."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(what + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def main(trees: list[str]) -> None:
    """Ask both checkouts in turns, and print a line for each model and number."""
    for name, shape in MODELS.items():
        command = [sys.executable, "-W", "ignore", __file__, "--work", *map(str, shape)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        places = [{**os.environ, "PYTHONPATH": tree, "OMP_NUM_THREADS": "1"} for tree in trees]
        workers = [subprocess.Popen(command, env=place, **pipes) for place in places]
        for what in ("step", "compress"):
            times: list[list[float]] = [[], []]
            for number in range(ROUNDS):
                for place in (0, 1) if number % 2 else (1, 0):
                    times[place].append(ask(workers[place], what)["ms"])
            ratio = statistics.median(after / before for before, after in zip(*times, strict=True))
            rows = [
                {"ms": statistics.median(one), **ask(w, f"{what} counts")}
                for one, w in zip(times, workers, strict=True)
            ]
            for number in rows[0]:
                print(f"{name:30} {f'{what}, {number}':28}", *(f"{row[number]:14,.2f}" for row in rows))
            print(f"{name:30} {f'{what}, after / before':28} {ratio:14.3f}", flush=True)
        for worker in workers:
            worker.communicate()


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(*map(int, sys.argv[2:]))
    else:
        main(sys.argv[1:])
