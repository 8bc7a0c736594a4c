"""``python -m bench.measured.step [MODEL ...]``: what a step of `generate` calls, patched beside unpatched.

One process, one thread, random models (the last of SmolLM2-135M's shapes, 6 of its layers). Counts are exact: what some
tokens more take more. Times are medians of processor time in turns, so that what else the machine does falls on all,
and printed as ratios to the unpatched model's. A compiled step's calls and operations are not seen from outside.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gistkern
from bench.measured.calls import Operations, count

ROUNDS, QUESTION = 15, 21
SHORT, LONG = 24, 40  # tokens; between them no tail finds its room full
# hidden size, layers, query heads, key/value heads, intermediate size, vocabulary
MODELS = {
    "2 layers of 64": (64, 2, 4, 2, 128, 256),
    "16 layers of 64": (64, 16, 4, 2, 128, 256),
    "6 of SmolLM2-135M": (576, 6, 9, 3, 1536, 49152),
}


def ways(name: str, compiled: bool) -> dict[str, Callable[[int], Any]]:
    """Answers of so many tokens to one question, by an unpatched model and over each kind of cache."""
    hidden, layers, heads, kv_heads, inner, words = MODELS[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": words}
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, eos_token_id=None)
    plain = LlamaForCausalLM(config).eval()
    model = copy.deepcopy(plain)
    gistkern.patch(model, num_gist_tokens=10)
    cache, question = gistkern.compress(model, torch.randint(0, 200, (1, 512))), torch.randint(0, 200, (1, QUESTION))
    fixed, token = cache.fixed(QUESTION + LONG), question[:, :1]
    shown = {"attention_mask": torch.ones_like(question), "pad_token_id": 0, "do_sample": False}

    def answer(reads: LlamaForCausalLM, **held: Any) -> Callable[[int], Any]:
        return lambda tokens: reads.generate(
            question, max_new_tokens=tokens, **shown, **{k: v() for k, v in held.items()}
        )

    def emptied() -> Any:
        fixed.reset_tail()
        return fixed

    found = {
        "unpatched, DynamicCache": answer(plain),
        "GistCache": answer(model, past_key_values=cache.clone),
        "GistCache, int8": answer(model, past_key_values=cache.to(gist_dtype=torch.int8).clone),
        "GistCache, shared": answer(model, past_key_values=cache.shared().clone),
        "FixedGistCache": answer(model, past_key_values=emptied),
    }
    if compiled:
        step = torch.compile(model, fullgraph=True)

        @torch.no_grad()
        def by_hand(tokens: int) -> None:
            model(question, past_key_values=emptied())
            for _ in range(tokens - 1):
                step(token, past_key_values=fixed)

        found["FixedGistCache, compiled"] = by_hand
    return found


def counts(answer: Callable[[int], Any]) -> list[float]:
    """Python calls, C calls, tensor operations and waits of a step."""
    answer(2)
    calls = count(lambda: answer(LONG)) - count(lambda: answer(SHORT))
    seen = []
    for tokens in (SHORT, LONG):
        with Operations() as operations:
            answer(tokens)
        seen.append((operations.total, operations.waits.total()))
    return [number / (LONG - SHORT) for number in (*calls, seen[1][0] - seen[0][0], seen[1][1] - seen[0][1])]


def seconds(answer: Callable[[int], Any]) -> float:
    """Processor time of a step."""
    spent = []
    for tokens in (SHORT, LONG):
        begin = time.process_time()
        answer(tokens)
        spent.append(time.process_time() - begin)
    return (spent[1] - spent[0]) / (LONG - SHORT)


def main(names: list[str], compiled: bool) -> None:
    """Print a line for each model and way."""
    print("| model | step | Python calls | C calls | operations | waits | time |\n|---|---|---|---|---|---|---|")
    for name in names:
        found = ways(name, compiled)
        for answer in found.values():
            answer(3)
        turns = [{way: seconds(answer) for way, answer in found.items()} for _ in range(ROUNDS)]
        base: list[float] = []
        for way, answer in found.items():
            ratio = statistics.median(turn[way] / turn["unpatched, DynamicCache"] for turn in turns)
            numbers = counts(answer) if "compiled" not in way else []
            base = base or numbers
            said = [f"{one:,.0f} ({one / other:.2f})" for one, other in zip(numbers[:3], base, strict=False)] or [
                "-"
            ] * 3
            print(
                f"| {name} | {way} | {' | '.join(said)} | {f'{numbers[3]:.0f}' if numbers else '-'} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([one for one in sys.argv[1:] if one != "--compiled"] or list(MODELS), "--compiled" in sys.argv)
