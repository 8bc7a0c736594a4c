"""Accuracy of a model from the gist rows alone: greedy, compressed before the question is seen.

Nothing here knows a preset but `evaluate_run`: a reader is a model, its tokenizer and a way to read contexts.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import LlamaForCausalLM

from answers import AnswerFile
from checkpoints import load_model, load_progress
from gistkern import GistCache, GistHandle, compress
from measure import side_by_side
from metrics import Answer, digit_accuracy, outcome, parsed, rows_of
from niah import KEY_DIGITS, Sample, dataset
from presets import Preset
from task import answer_logits, haystacks, make_batch

__all__ = [
    "FullReader",
    "GistReader",
    "Reader",
    "answer_samples",
    "build_report",
    "evaluate_run",
    "swap_test",
]

# samples read together: changes nothing in the answers, and of 1 to 10 four were read fastest on CPU
BATCH = 4
DECODING = "greedy, from the gist rows alone; the context is compressed before the question is seen"


class Reader(Protocol):
    """Reads contexts and answers their questions."""

    digest: str

    def read(self, samples: Sequence[Sample]) -> list[tuple[str, int, int, int]]:
        """What is said to each sample, the rows and bytes cached for its context, and the bytes of one row."""
        ...


class GistReader:
    """Compresses contexts, then answers from the gist rows.

    Parameters
    ----------
    model : PreTrainedModel
        Patched by `gistkern.patch_llama`, in the dtype to evaluate.
    tokenizer : tokenizers.Tokenizer
        Of the model (`backend_tokenizer` of a transformers one).
    compression : mapping, optional
        Arguments of `gistkern.compress`: segment_length and segment_overlap, or nothing.
    new_tokens : int, optional
        Most tokens to say. By default as many as the longest permitted answer has, for models that were not
        trained to stop; a model that ends its answer itself may have more.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Tokenizer,
        compression: Mapping[str, int] | None = None,
        new_tokens: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.new_tokens = model, tokenizer, new_tokens
        self.compression = dict(compression or {})
        self.digest = _digest("gist", model, tokenizer, self.compression, new_tokens)

    def read(self, samples: Sequence[Sample]) -> list[tuple[str, int, int, int]]:
        """Compress, then ask."""
        cache = self.compress(samples)
        rows = cache.gist_rows.tolist()
        row_bytes = cache.nbytes // (len(samples) * cache.layers[0].keys.shape[2])
        said = self.ask(cache, samples)
        return [(text, count, count * row_bytes, row_bytes) for text, count in zip(said, rows, strict=True)]

    def compress(self, samples: Sequence[Sample]) -> GistCache:
        """The gist rows of the samples' contexts."""
        ids, mask = _left_padded(self.model, self.tokenizer, [sample.context for sample in samples])
        return compress(self.model, ids, mask, **self.compression)

    def ask(self, cache: GistCache, samples: Sequence[Sample]) -> list[str]:
        """What is said to the questions of the samples; the cache is used up."""
        ids, mask = _left_padded(self.model, self.tokenizer, [sample.question for sample in samples])
        return _generate(self, samples, ids, mask, past_key_values=cache)


class FullReader:
    """Answers with the whole context in sight: what the same questions score without compression.

    The model is not patched, or not for this: transformers' own attention and cache.
    """

    def __init__(self, model: LlamaForCausalLM, tokenizer: Tokenizer, new_tokens: int | None = None) -> None:
        self.model, self.tokenizer, self.new_tokens = model, tokenizer, new_tokens
        self.digest = _digest("full", model, tokenizer, {}, new_tokens)

    def read(self, samples: Sequence[Sample]) -> list[tuple[str, int, int, int]]:
        """Context and question in one prompt."""
        ids, mask = _left_padded(self.model, self.tokenizer, [sample.context + sample.question for sample in samples])
        said = _generate(self, samples, ids, mask)
        config = self.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * self.model.dtype.itemsize
        return [(text, s.tokens, s.tokens * row_bytes, row_bytes) for text, s in zip(said, samples, strict=True)]


def _generate(
    reader: GistReader | FullReader, samples: Sequence[Sample], ids: torch.Tensor, mask: torch.Tensor, **cache: Any
) -> list[str]:
    tokenizer = reader.tokenizer
    permitted = {text for sample in samples for text in getattr(sample, "choices", (sample.answer,))}
    most = reader.new_tokens or max(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in permitted)
    out = reader.model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, **cache)
    return [tokenizer.decode(row) for row in out[:, ids.shape[1] :].tolist()]


def _left_padded(
    model: LlamaForCausalLM, tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of texts on the model's device, padded on the left with 0."""
    encoded = [torch.tensor(one.ids) for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in encoded])
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    return ids.to(model.device), mask.to(model.device)


def _digest(
    how: str, model: LlamaForCausalLM, tokenizer: Tokenizer, compression: Mapping[str, int], new_tokens: int | None
) -> str:
    """Identity of weights, tokenizer and way of reading."""
    digest = hashlib.sha256(json.dumps([how, compression, new_tokens, tokenizer.to_str()], sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _question_digest(sample: Sample) -> str:
    return hashlib.sha256(json.dumps(asdict(sample), sort_keys=True).encode()).hexdigest()[:16]


def answer_samples(
    reader: Reader,
    samples: Sequence[Sample],
    *,
    batch: int = BATCH,
    stream: Path | None = None,
    overwrite: bool = False,
    show: str = "",
) -> list[Answer]:
    """Answers to all samples, in their order.

    Parameters
    ----------
    reader : Reader
        Who answers.
    samples : sequence of Sample
        Of one or several lengths, languages and tasks.
    batch : int
        Samples read together.
    stream : Path, optional
        File that gets every batch's answers as they come, and whose answers are not asked again.
    overwrite : bool
        Replace a `stream` of another evaluation.
    show : str
        Title of the progress bar; none without.

    Raises
    ------
    ValueError
        If a sample stands there twice, or as `AnswerFile` says.
    """
    digests = [_question_digest(sample) for sample in samples]
    if len(set(digests)) < len(digests):
        raise ValueError("the samples hold the same question twice: pass each dataset once")
    by_digest = dict(zip(digests, samples, strict=True))
    file = AnswerFile(stream, reader.digest, digests, overwrite)
    with tqdm(total=len(samples), initial=len(file.done), desc=show, disable=not show, unit="sample") as bar:
        for group in _batches({d: s for d, s in by_digest.items() if d not in file.done}, batch):
            read = reader.read([by_digest[digest] for digest in group])
            file.add(
                _answer(reader, digest, by_digest[digest], *said) for digest, said in zip(group, read, strict=True)
            )
            exact = sum(answer.exact for answer in file.done.values()) / len(file.done)
            bar.update(len(group))
            bar.set_postfix_str(f"exact {exact:.1%}")
    return [file.done[digest] for digest in digests]


def _batches(samples: dict[str, Sample], size: int) -> Iterator[list[str]]:
    """Digests in batches of one task and length, so that neither padding nor the answer's length is shared."""
    groups: dict[tuple[str, int], list[str]] = {}
    for digest, sample in samples.items():
        groups.setdefault((_task(sample), sample.tokens), []).append(digest)
    for group in groups.values():
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _task(sample: Sample) -> str:
    return getattr(sample, "task", "passkey")


def _answer(reader: Reader, digest: str, sample: Sample, said: str, rows: int, size: int, row_bytes: int) -> Answer:
    return Answer(
        model=reader.digest,
        digest=digest,
        id=sample.id,
        task=_task(sample),
        language=sample.language,
        tokens=sample.tokens,
        filler=sample.filler,
        wordings=sample.wordings,
        keys=len(sample.keys),
        depth=sample.depth,
        answer=sample.answer,
        chance=getattr(sample, "chance", 10.0**-KEY_DIGITS),
        said=said,
        outcome=outcome(said, sample.answer, sample.context, getattr(sample, "choices", ())),
        digits=digit_accuracy(said, sample.answer),
        rows=rows,
        bytes=size,
        full_bytes=sample.tokens * row_bytes,
    )


def swap_test(reader: GistReader, samples: Sequence[Sample]) -> dict[str, Any]:
    """Give each passkey question the cache of the next sample: the answer must be that sample's key, not its own."""
    swapped = own = n = 0
    for begin in range(0, len(samples) - 1, BATCH):
        batch = samples[begin : begin + BATCH]
        if len(batch) < 2:
            continue
        order = torch.roll(torch.arange(len(batch)), -1)
        cache = reader.compress(batch)
        cache.batch_select_indices(order)
        for place, said in enumerate(reader.ask(cache, batch)):
            swapped += parsed(said) == batch[int(order[place])].answer
            own += parsed(said) == batch[place].answer
            n += 1
    return {"n": n, "answers_of_the_swapped_cache": swapped / n, "answers_of_the_own_context": own / n}


def build_report(
    checkpoint: Path,
    name: str,
    reader: GistReader,
    answers: Sequence[Answer],
    probe: Sequence[Sample],
    measured: dict[str, Any] | None,
) -> dict[str, Any]:
    """A report in the one shape that all tables and plots are made of.

    `probe` are passkey samples for the swap test; `measured` is what `measure.side_by_side` found, if it was asked.
    """
    progress, model = load_progress(checkpoint), reader.model
    return {
        "preset": name,
        "checkpoint": checkpoint.name,
        "seed": progress.seed,
        "training": {
            "steps": progress.curriculum["step"],
            "tokens": progress.tokens,
            "cpu_seconds": round(progress.cpu_seconds),
        },
        "model": {
            "type": model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "decoding": DECODING,
        "compression": reader.compression,
        "rows": rows_of(answers),
        "swap": swap_test(reader, probe) if len(probe) > 1 else None,
        "side_by_side": measured,
        "answers": [asdict(answer) for answer in answers],
    }


def evaluate_run(checkpoint: Path, settings: Preset, run: Path, seed: int = 1) -> dict[str, Any]:
    """Evaluate a checkpoint on the preset's held-out grid and write report.json, report.md and the plots."""
    from report import write_report

    model, handle, tokenizer = load_model(checkpoint)
    model.eval()
    reader = GistReader(model, tokenizer, settings.segments)
    samples = [
        sample
        for language, tokens, count, *filler_and_wordings in settings.evaluate
        for sample in dataset(
            tokenizer,
            language,
            tokens,
            count,
            seed=seed,
            asked_by=settings.asked_by,
            **dict(zip(("filler", "wordings"), filler_and_wordings, strict=False)),
        )
    ]
    answers = answer_samples(
        reader, samples, stream=run / "answers.jsonl", overwrite=True, show=f"evaluating {settings.name}"
    )
    language, tokens, *_ = max(settings.evaluate, key=lambda row: row[1])
    probe = list(dataset(tokenizer, language, tokens, 20, seed=seed + 1, asked_by=settings.asked_by))
    measured = side_by_side(checkpoint, tokenizer, probe[0], settings.segments)
    report = build_report(checkpoint, settings.name, reader, answers, probe, measured)
    report["evaluation_seed"] = seed
    if settings.leak:
        report["context_visible"] = context_visible(model, handle, tokenizer, settings, seed)
    write_report(report, run)
    return report


def context_visible(
    model: LlamaForCausalLM, handle: GistHandle, tokenizer: Tokenizer, settings: Preset, seed: int
) -> list[dict[str, Any]]:
    """Exact match of a model trained with `--leak` while the context is still in sight, as in its training."""
    found = []
    stage = replace(settings.stages[-1], batch_size=50)
    drawn = haystacks(settings, tokenizer, True, str(seed))
    for language in drawn:
        alone = replace(settings, languages=(language,))
        batch = make_batch(drawn, handle, stage, alone, random.Random(f"{seed}-{language}"))
        with torch.no_grad():
            said = answer_logits(model, batch, leak=True).argmax(-1)
        hits = (said == batch.answers).all(1).float().mean().item()
        found.append({"language": language, "n": len(said), "exact": hits})
    return found
