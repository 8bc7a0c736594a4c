"""``python bench/measured/cached_step.py TREE [TREE ...]``: a cached decode step and `compress`, of several checkouts.

Each round runs every checkout once, in a process of its own, one after the other and then the other way round, so that
what else the machine does falls on all of them. Printed is the median of the rounds: milliseconds of processor time,
Python and C calls of one step, operations on tensors, and the bytes that copying operations (``cat``, ``copy_``,
``clone``, ``index``, ``gather``) wrote in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

ROUNDS = 6
MODELS = {
    "2 layers of 64": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "SmolLM2-135M, 6 of its layers": {
        "hidden_size": 576, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
}  # fmt: skip
COPIES = ("cat", "copy_", "clone", "index", "gather", "index_select", "_to_copy")
QUESTION, STEPS = 256, 64


def main(trees: list[str]) -> None:
    """Run all checkouts in turns and print a line for each model and number."""
    found: dict[str, list[dict]] = {tree: [] for tree in trees}
    for number in range(ROUNDS):
        for tree in trees if number % 2 else trees[::-1]:
            environment = {**os.environ, "PYTHONPATH": tree, "OMP_NUM_THREADS": "1", "MEASURE": "1"}
            done = subprocess.run(
                [sys.executable, __file__], env=environment, capture_output=True, text=True, check=True
            )
            found[tree].append(json.loads(done.stdout.splitlines()[-1]))
    for model in MODELS:
        for number in found[trees[0]][0][model]:
            medians = [statistics.median(one[model][number] for one in found[tree]) for tree in trees]
            print(f"{model:30} {number:28}", *(f"{value:14,.2f}" for value in medians))


def measure() -> dict[str, dict[str, float]]:
    """One round of the checkout that is imported."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import gistkern

    torch.set_num_threads(1)
    found = {}
    for name, shape in MODELS.items():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, intermediate_size=2 * shape["hidden_size"], vocab_size=256)
        model = LlamaForCausalLM(config).eval()
        gistkern.patch_llama(model, num_gist_tokens=10)
        with torch.no_grad():
            found[name] = numbers(model, gistkern, torch)
    return found


def numbers(model, gistkern, torch) -> dict[str, float]:
    """Of one model: a step behind 10 gist rows and a question, and compressing 2,048 tokens in segments."""
    context, question = (torch.randint(0, 200, (1, tokens)) for tokens in (512, QUESTION))
    token = question[:, :1]
    compressed = gistkern.compress(model, context)

    def asked():
        cache = compressed.clone()
        model(question, past_key_values=cache)
        model(token, past_key_values=cache)  # of one row more: the step that finds no room has been
        return cache

    cache, times = asked(), []
    for _ in range(STEPS):
        begin = time.process_time()
        model(token, past_key_values=cache)
        times.append(1e3 * (time.process_time() - begin))

    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    cache = asked()
    sys.setprofile(count)
    model(token, past_key_values=cache)
    sys.setprofile(None)

    operations, copied = counted(torch, lambda cache: model(token, past_key_values=cache), asked())
    long = torch.randint(0, 200, (1, 2048))
    compressing = []
    for _ in range(3):
        begin = time.process_time()
        gistkern.compress(model, long, segment_length=128)
        compressing.append(1e3 * (time.process_time() - begin))
    compress_operations, compress_copied = counted(torch, lambda _: gistkern.compress(model, long, segment_length=128))
    return {
        "step, ms": statistics.median(times),
        "step, Python and C calls": calls,
        "step, tensor operations": operations,
        "step, bytes copied": copied,
        "compress, ms": min(compressing),
        "compress, tensor operations": compress_operations,
        "compress, bytes copied": compress_copied,
    }


def counted(torch, call, argument=None) -> tuple[int, int]:
    """Tensor operations of a call, and the bytes that copying ones wrote."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        operations = copied = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            name = function._schema.name.removeprefix("aten::")
            self.operations += 1
            self.copied += out.nbytes if name in COPIES else 0
            return out

    with Count() as count:
        call(argument)
    return count.operations, count.copied


if __name__ == "__main__":
    if os.environ.get("MEASURE"):
        print(json.dumps(measure()))
    else:
        main(sys.argv[1:])
