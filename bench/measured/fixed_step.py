"""``python -m bench.measured.fixed_step [MODEL ...]``: a decode step over a GistCache, a fixed one, and that compiled.

One process, one thread, random models (the second of SmolLM2-135M's shapes, 6 of its layers), in turns so that what
else the machine does falls on all. Printed are medians: milliseconds of processor time of a step, its ratio to the
GistCache's in the same round, and what a step of each calls.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gistkern
from bench.measured.cached_step import counted

ROUNDS, STEPS, QUESTION = 21, 20, 64
# hidden size, layers, query heads, key/value heads, intermediate size, vocabulary
MODELS = {"2 layers of 64": (64, 2, 4, 2, 128, 256), "6 of SmolLM2-135M": (576, 6, 9, 3, 1536, 49152)}


@torch.no_grad()
def steps(name: str) -> None:
    """Measure one model and print a line for each way to decode."""
    hidden, layers, heads, kv_heads, inner, words = MODELS[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": words}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads)).eval()
    gistkern.patch(model, num_gist_tokens=10)
    compressed = gistkern.compress(model, torch.randint(0, 200, (1, 512)))
    question, token = torch.randint(0, 200, (1, QUESTION)), torch.tensor([[7]])
    compiled, fixed = torch.compile(model, fullgraph=True), compressed.fixed(QUESTION + STEPS + 3)

    def ready(cache: Any) -> Any:
        """The question, and the step that finds no room or is compiled."""
        model(question, past_key_values=cache)
        (compiled if cache is fixed else model)(token, past_key_values=cache)
        return cache

    def begin(way: str) -> Callable[[], Any]:
        if way == "GistCache":
            cache = ready(compressed.clone())
        else:
            fixed.reset_tail()
            cache = ready(fixed)
        call = compiled if way == "fixed, compiled" else model
        return lambda: call(token, past_key_values=cache)

    ways = ["GistCache", "fixed", "fixed, compiled"]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way in ways[:: 1 if number % 2 else -1]:
            step = begin(way)
            start = time.process_time()
            for _ in range(STEPS):
                step()
            if number:  # the first is left out
                times[way].append((time.process_time() - start) / STEPS * 1e3)
    for way in ways:
        ratio = statistics.median(one / other for one, other in zip(times[way], times["GistCache"], strict=True))
        # a compiled program's operations are not seen from outside
        count = {} if way == "fixed, compiled" else counted(begin(way))
        said = ", ".join(f"{value:,.0f} {what}" for what, value in count.items())
        print(f"{name:16} {way:16} {statistics.median(times[way]):8.2f} ms  {ratio:6.3f}  {said}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for model_name in sys.argv[1:] or MODELS:
        steps(model_name)
