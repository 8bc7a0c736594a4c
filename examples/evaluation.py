"""Passkey accuracy of a checkpoint from the gist rows alone: greedy, compressed before the question is seen."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import LlamaForCausalLM

from checkpoints import load_model
from gistkern import GistCache, GistHandle, compress
from measure import side_by_side
from niah import KEY_DIGITS, Haystack, Sample, dataset
from presets import Preset
from task import answer_logits, make_batch

__all__ = ["Answer", "answer_samples", "evaluate_run", "rows_of", "swap_test", "wilson"]

# samples compressed together: bounds memory, changes nothing in the answers
BATCH = 10


@dataclass(frozen=True)
class Answer:
    """What the model said to one sample, from how many cached rows and bytes."""

    sample: Sample
    said: str
    gist_rows: int
    gist_bytes: int

    @property
    def exact(self) -> bool:
        """Whether every digit is right and nothing else was said."""
        return self.said == self.sample.answer

    @property
    def digits(self) -> float:
        """Fraction of digits in their right places."""
        return sum(a == b for a, b in zip(self.said, self.sample.answer, strict=False)) / KEY_DIGITS


def answer_samples(
    model: LlamaForCausalLM, tokenizer: Tokenizer, samples: Sequence[Sample], segments: dict[str, int], show: str = ""
) -> Iterable[Answer]:
    """Compress each context, then generate the answer to its question from the cache."""
    for begin in tqdm(range(0, len(samples), BATCH), desc=show, disable=not show, leave=False):
        batch = samples[begin : begin + BATCH]
        cache = compress_samples(model, tokenizer, batch, segments)
        rows, size = cache.gist_rows.tolist(), cache.nbytes // len(batch)
        for sample, said, count in zip(batch, ask(model, tokenizer, cache, batch), rows, strict=True):
            yield Answer(sample, said, count, size)


def compress_samples(
    model: LlamaForCausalLM, tokenizer: Tokenizer, samples: Sequence[Sample], segments: dict[str, int]
) -> GistCache:
    ids, mask = left_padded(tokenizer, [sample.context for sample in samples])
    return compress(model, ids, mask, **segments)


def ask(model: LlamaForCausalLM, tokenizer: Tokenizer, cache: GistCache, samples: Sequence[Sample]) -> list[str]:
    """The model's greedy answers; the cache is used up."""
    ids, mask = left_padded(tokenizer, [sample.question for sample in samples])
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=KEY_DIGITS, do_sample=False)
    return [tokenizer.decode(row) for row in out[:, ids.shape[1] :].tolist()]


def left_padded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of texts, padded on the left with 0."""
    encoded = [torch.tensor(one.ids) for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in encoded])
    return ids, (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, "Probable inference, the law of succession")."""
    if not n:
        return 0.0, 1.0
    share, square = hits / n, z * z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def rows_of(answers: Sequence[Answer], bytes_per_token: int) -> list[dict[str, Any]]:
    """One row of the report per (language, length)."""
    groups: dict[tuple[str, int], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.sample.language, answer.sample.tokens), []).append(answer)
    rows = []
    for (language, tokens), group in groups.items():
        n, hits = len(group), sum(answer.exact for answer in group)
        low, high = wilson(hits, n)
        full = tokens * bytes_per_token
        rows.append(
            {
                "language": language,
                "tokens": tokens,
                "gist_tokens": group[0].gist_rows,
                "ratio": tokens / group[0].gist_rows,
                "n": n,
                "exact": hits / n,
                "wilson_low": low,
                "wilson_high": high,
                "digit": sum(answer.digits for answer in group) / n,
                "chance": 10.0**-KEY_DIGITS,
                "full_kv_bytes": full,
                "gist_kv_bytes": group[0].gist_bytes,
                "bytes_ratio": full / group[0].gist_bytes,
                "by_depth": _by_depth(group),
            }
        )
    return rows


def _by_depth(group: Sequence[Answer], bins: int = 10) -> list[dict[str, Any]]:
    """Exact match per tenth of the context in which the needle starts."""
    found = []
    for index in range(bins):
        inside = [a for a in group if min(int(a.sample.depth * bins), bins - 1) == index]
        exact = sum(a.exact for a in inside) / len(inside) if inside else None
        found.append({"depth": (index + 0.5) / bins, "n": len(inside), "exact": exact})
    return found


def swap_test(
    model: LlamaForCausalLM, tokenizer: Tokenizer, samples: Sequence[Sample], segments: dict[str, int]
) -> dict[str, Any]:
    """Give each question the cache of the next sample: the answer must be that sample's key, not its own."""
    swapped = own = n = 0
    for begin in range(0, len(samples) - 1, BATCH):
        batch = samples[begin : begin + BATCH]
        if len(batch) < 2:
            continue
        order = torch.roll(torch.arange(len(batch)), -1)
        cache = compress_samples(model, tokenizer, batch, segments)
        cache.batch_select_indices(order)
        for place, said in enumerate(ask(model, tokenizer, cache, batch)):
            swapped += said == batch[int(order[place])].answer
            own += said == batch[place].answer
            n += 1
    return {"n": n, "answers_of_the_swapped_cache": swapped / n, "answers_of_the_own_context": own / n}


def evaluate_run(checkpoint: Path, settings: Preset, run: Path, seed: int = 1) -> dict[str, Any]:
    """Evaluate a checkpoint on the preset's held-out grid and write report.json, report.md and heatmap.png."""
    from report import write_report

    model, handle, tokenizer = load_model(checkpoint)
    model.eval()
    answers: list[Answer] = []
    for language, tokens, count in settings.evaluate:
        samples = list(dataset(tokenizer, language, tokens, count, seed=seed))
        show = f"evaluating {language} {tokens}"
        answers += answer_samples(model, tokenizer, samples, settings.segments, show)
    language, tokens, _ = max(settings.evaluate, key=lambda row: row[1])
    probe = list(dataset(tokenizer, language, tokens, 20, seed=seed + 1))
    config = model.config
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    report = {
        "preset": settings.name,
        "checkpoint": checkpoint.name,
        "decoding": "greedy, from the gist rows alone; the context is compressed before the question is seen",
        "rows": rows_of(answers, bytes_per_token),
        "swap": swap_test(model, tokenizer, probe, settings.segments),
        "side_by_side": side_by_side(checkpoint, tokenizer, probe[0], settings.segments),
        "answers": [{**asdict(a.sample), "context": None, "said": a.said} for a in answers],
    }
    if settings.leak:
        report["context_visible"] = context_visible(model, handle, tokenizer, settings, seed)
    write_report(report, run)
    return report


def context_visible(
    model: LlamaForCausalLM, handle: GistHandle, tokenizer: Tokenizer, settings: Preset, seed: int
) -> list[dict[str, Any]]:
    """Exact match of a model trained with `--leak` while the context is still in sight, as in its training."""
    found = []
    for language in settings.languages:
        rng = random.Random(f"{seed}-{language}")
        batch = make_batch(
            Haystack(tokenizer, language, True, rng), handle, replace(settings.stages[-1], batch_size=50), rng
        )
        with torch.no_grad():
            said = answer_logits(model, batch, leak=True).argmax(-1)
        hits = (said == batch.answers).all(1).float().mean().item()
        found.append({"language": language, "n": len(said), "exact": hits})
    return found
