"""Ways to read a context and answer its question: from gist rows, or with the whole context in sight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from gistkern import GistCache, compress, left_padded
from passkey.metrics import Answer
from passkey.niah import Sample

__all__ = ["Reader"]


@dataclass(frozen=True)
class Reader:
    """Reads contexts and answers their questions.

    The `model` is patched by `gistkern.patch_llama` unless the reader is `full`: context and question in one prompt,
    with transformers' own attention and cache. `compression` are arguments of `gistkern.compress`, `start` ids in front
    of every context, which its length does not count (Llama 3: <|begin_of_text|>). At most `new_tokens` are said; by
    default as many as the longest right answer has, for models that were not trained to stop.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    compression: Mapping[str, int] = field(default_factory=dict)
    new_tokens: int | None = None
    start: Sequence[int] = ()
    full: bool = False

    def read(self, samples: Sequence[Sample]) -> list[Answer]:
        """What is said to each sample."""
        if self.full:
            texts = [sample.context + sample.question for sample in samples]
            said, rows = self._said(samples, *self._padded(texts, self.start)), [sample.tokens for sample in samples]
            config = self.model.config
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            row_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * self.model.dtype.itemsize
        else:
            cache = self.compress(samples)
            row_bytes = cache.nbytes // (len(samples) * cache.layers[0].gist.key.shape[2])
            rows, said = cache.gist_rows.tolist(), self.ask(cache, samples)
        return [Answer(*one, row_bytes) for one in zip(samples, said, rows, strict=True)]

    def compress(self, samples: Sequence[Sample]) -> GistCache:
        """The gist rows of the samples' contexts."""
        ids, mask = self._padded([sample.context for sample in samples], self.start)
        return compress(self.model, ids, mask, **self.compression)

    def ask(self, cache: GistCache, samples: Sequence[Sample]) -> list[str]:
        """What is said to the questions of the samples; the cache is used up."""
        return self._said(samples, *self._padded([sample.question for sample in samples]), past_key_values=cache)

    def _said(self, samples: Sequence[Sample], ids: torch.Tensor, mask: torch.Tensor, **cache: Any) -> list[str]:
        answers = self.tokenizer.encode_batch([sample.answer for sample in samples], add_special_tokens=False)
        most = self.new_tokens or max(len(answer.ids) for answer in answers)
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, **cache)
        return [self.tokenizer.decode(row) for row in out[:, ids.shape[1] :].tolist()]

    def _padded(self, texts: Sequence[str], start: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (`start` and the text's) and attention mask on the model's device."""
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ids, mask = left_padded([torch.tensor([*start, *one.ids], device=self.model.device) for one in encoded])
        return ids, mask.long()

    @cached_property
    def digest(self) -> str:
        """Identity of weights, tokenizer and way of reading."""
        how = [self.full, dict(self.compression), self.new_tokens, list(self.start), self.tokenizer.to_str()]
        digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]
