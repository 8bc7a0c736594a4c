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
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import gistkern
from bench.measured.calls import Operations, count
from bench.measured.case import OURS, Case
from bench.shapes import MODELS as SHAPES

ROUNDS, QUESTION = 15, 21
SHORT, LONG = 24, 40  # tokens; between them no tail finds its room full
UNPATCHED = "unpatched, DynamicCache"
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "2 layers of 64": _SMALL | {"num_hidden_layers": 2},
    "16 layers of 64": _SMALL | {"num_hidden_layers": 16},
    "6 of SmolLM2-135M": SHAPES["SmolLM2-135M"] | {"num_hidden_layers": 6, "tie_word_embeddings": False},
}


def ways(name: str, compiled: bool, device: str = "cpu") -> dict[str, Callable[[int], Any]]:
    """Answers of so many tokens to one question, by an unpatched model and over each kind of cache."""
    torch.manual_seed(0)
    config = LlamaConfig(**(MODELS | SHAPES)[name], eos_token_id=None)
    with torch.device(device):  # drawn where they stay
        plain = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if device == "cpu" else torch.bfloat16
        ).eval()
    model = copy.deepcopy(plain)
    gistkern.patch(model, num_gist_tokens=10)
    context, question = (torch.randint(0, 200, (1, tokens), device=device) for tokens in (512, QUESTION))
    cache = gistkern.compress(model, context)
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
        UNPATCHED: answer(plain),
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


def generating_case(name: str, device: str = "cpu") -> Case:
    """An answer by `generate` from gist rows, beside the unpatched model's: tokens per second, the question's too."""
    found = ways(name, False, device)
    calls = {OURS: found.pop("GistCache"), **found}
    return Case(device, {way: partial(answer, SHORT) for way, answer in calls.items()}, tokens=SHORT)


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
            ratio = statistics.median(turn[way] / turn[UNPATCHED] for turn in turns)
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
