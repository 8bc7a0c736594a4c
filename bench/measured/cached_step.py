"""``python bench/measured/cached_step.py BEFORE AFTER``: a cached decode step and `compress` of two checkouts.

Each checkout has a process of its own, and they are asked in turns, one waiting while the other works, so that what else
the machine does falls on both. Printed is the median and the least of the rounds in milliseconds of processor time,
the median of each round's ratio, and what a step and a compression do: Python and C calls, operations on tensors, and
the bytes that copying operations (``cat``, ``copy_``, ``clone``, ``index``, ``gather``) write.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

ROUNDS = 21
MODELS = {
    "2 layers of 64": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "6 layers of SmolLM2-135M": {
        "hidden_size": 576,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}
COPIES = ("cat", "copy_", "clone", "index", "gather", "index_select", "_to_copy")
QUESTION, STEPS = 256, 40


def main(trees: list[str]) -> None:
    """Ask both checkouts in turns, and print a line for each model and number."""
    for name, shape in MODELS.items():
        workers = [start(tree, shape) for tree in trees]
        for what in ("step", "compress"):
            times: list[list[float]] = [[], []]
            for number in range(ROUNDS):
                for place in (0, 1) if number % 2 else (1, 0):
                    times[place].append(ask(workers[place], what)["ms"])
            ratio = statistics.median(after / before for before, after in zip(*times, strict=True))
            for said, pick in (("median", statistics.median), ("least", min)):
                line(name, f"{what}, ms, {said}", *(pick(one) for one in times))
            print(f"{name:26} {f'{what}, ratio of a round':34} {ratio:14.3f}")
            counts = [ask(worker, f"{what} counts") for worker in workers]
            for number in counts[0]:
                line(name, f"{what}, {number}", *(one[number] for one in counts))
        for worker in workers:
            worker.communicate()


def line(name: str, number: str, before: float, after: float) -> None:
    """Print a number of both checkouts."""
    print(f"{name:26} {number:34} {before:14,.2f} {after:14,.2f}", flush=True)


def start(tree: str, shape: dict[str, int]) -> subprocess.Popen:
    """A process that imports one checkout and waits for what to measure."""
    environment = {**os.environ, "PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--work", json.dumps(shape)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: subprocess.Popen, what: str) -> dict[str, float]:
    """What a process measures now."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(what + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def work(shape: dict[str, int]) -> None:
    """Measure what each line of the input names: a step behind 10 gist rows and a question, or a compression."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import gistkern

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    config = LlamaConfig(**shape, intermediate_size=2 * shape["hidden_size"], vocab_size=256)
    model = LlamaForCausalLM(config).eval()
    gistkern.patch_llama(model, num_gist_tokens=10)
    context, question, long = (torch.randint(0, 200, (1, tokens)) for tokens in (512, QUESTION, 2048))
    compressed, token = gistkern.compress(model, context), question[:, :1]

    for asked in sys.stdin:
        what, *counts = asked.split()
        cache = compressed.clone()
        model(question, past_key_values=cache)
        for _ in range(2):  # the first of them makes room
            model(token, past_key_values=cache)

        def call(what: str = what, cache: gistkern.GistCache = cache) -> None:
            if what == "step":
                model(token, past_key_values=cache)
            else:
                gistkern.compress(model, long, segment_length=128)

        found = counted(call) if counts else {"ms": timed(call, STEPS if what == "step" else 1)}
        print(json.dumps(found), flush=True)


def timed(call, times: int) -> float:
    """Median of so many calls, milliseconds of processor time."""
    spent = []
    for _ in range(times):
        begin = time.process_time()
        call()
        spent.append(1e3 * (time.process_time() - begin))
    return statistics.median(spent)


def counted(call) -> dict[str, float]:
    """Python and C calls, operations on tensors, and the bytes that copying ones write."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = {"Python and C calls": 0, "operations on tensors": 0, "bytes copied": 0}

    def profile(frame, event, argument):
        found["Python and C calls"] += event in ("call", "c_call")

    sys.setprofile(profile)
    call()
    sys.setprofile(None)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            found["operations on tensors"] += 1
            found["bytes copied"] += out.nbytes if function._schema.name.removeprefix("aten::") in COPIES else 0
            return out

    with Count():
        call()
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work(json.loads(sys.argv[2]))
    else:
        main(sys.argv[1:])
