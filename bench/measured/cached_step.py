"""``python bench/measured/cached_step.py TREE [TREE ...]``: a cached decode step and `compress`, of several checkouts.

Each round runs every checkout once, in a process of its own, one after the other and then the other way round, so that
what else the machine does falls on all of them. Printed is the median of the rounds: milliseconds of processor time,
Python and C calls of one step, operations on tensors, and the bytes that copying operations wrote in it.
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

ROUNDS = 3
# hidden size, layers, query heads, key/value heads
MODELS = {"2 layers of 64": (64, 2, 4, 2), "SmolLM2-135M, 6 of its layers": (576, 6, 9, 3)}
COPIES = ("cat", "copy_", "clone", "index", "gather", "index_select", "_to_copy")
QUESTION, STEPS = 256, 64


class Count(TorchDispatchMode):
    """Tensor operations within the block, and the bytes that copying ones wrote."""

    operations = copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        self.copied += out.nbytes if function._schema.name.removeprefix("aten::") in COPIES else 0
        return out


@torch.no_grad()
def numbers(hidden: int, layers: int, heads: int, kv_heads: int) -> dict[str, float]:
    """Of one model: a step behind 10 gist rows and a question, and compressing 2,048 tokens in segments."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 2 * hidden, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads)
    model = LlamaForCausalLM(config).eval()
    gistkern.patch_llama(model, num_gist_tokens=10)
    context, question, long = (torch.randint(0, 200, (1, tokens)) for tokens in (512, QUESTION, 2048))
    token = question[:, :1]
    compressed = gistkern.compress(model, context)

    def asked() -> Any:
        cache = compressed.clone()
        model(question, past_key_values=cache)
        model(token, past_key_values=cache)  # of one row more: the step that finds no room has been
        return cache

    cache, calls = asked(), 0
    times = [_milliseconds(lambda: model(token, past_key_values=cache)) for _ in range(STEPS)]

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    cache = asked()
    sys.setprofile(count)
    model(token, past_key_values=cache)
    sys.setprofile(None)
    cache = asked()
    with Count() as step:
        model(token, past_key_values=cache)
    compressing = [_milliseconds(lambda: gistkern.compress(model, long, segment_length=128)) for _ in range(3)]
    with Count() as compress:
        gistkern.compress(model, long, segment_length=128)
    return {
        "step, ms": statistics.median(times),
        "step, Python and C calls": calls,
        "step, tensor operations": step.operations,
        "step, bytes copied": step.copied,
        "compress, ms": min(compressing),
        "compress, tensor operations": compress.operations,
        "compress, bytes copied": compress.copied,
    }


def _milliseconds(call: Callable[[], Any]) -> float:
    begin = time.process_time()
    call()
    return 1e3 * (time.process_time() - begin)


def main(trees: list[str]) -> None:
    """Run all checkouts in turns and print a line for each model and number; without any, be one round of one."""
    if not trees:
        torch.set_num_threads(1)
        print(json.dumps({name: numbers(*sizes) for name, sizes in MODELS.items()}))
        return
    found: dict[str, list[dict]] = {tree: [] for tree in trees}
    for tree in [tree for number in range(ROUNDS) for tree in (trees if number % 2 else trees[::-1])]:
        environment = os.environ | {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
        found[tree].append(json.loads(done.stdout.splitlines()[-1]))
    for model in MODELS:
        for number in found[trees[0]][0][model]:
            medians = [statistics.median(one[model][number] for one in found[tree]) for tree in trees]
            print(f"{model:30} {number:28}", *(f"{value:14,.2f}" for value in medians))


if __name__ == "__main__":
    main(sys.argv[1:])
