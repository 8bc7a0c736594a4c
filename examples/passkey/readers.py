"""Ways to read a context and answer its question: from gist rows, or with the whole context in sight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from gistkern import GistCache, compress, left_padded
from passkey.niah import Sample

__all__ = ["FullReader", "GistReader", "Reader"]


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
    start : sequence of int
        Ids in front of every context, which its length does not count (Llama 3: <|begin_of_text|>).
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: Tokenizer,
        compression: Mapping[str, int] | None = None,
        new_tokens: int | None = None,
        start: Sequence[int] = (),
    ) -> None:
        self.model, self.tokenizer, self.new_tokens, self.start = model, tokenizer, new_tokens, list(start)
        self.compression = dict(compression or {})
        self.digest = _digest("gist", self, self.compression)

    def read(self, samples: Sequence[Sample]) -> list[tuple[str, int, int, int]]:
        """Compress, then ask."""
        cache = self.compress(samples)
        rows = cache.gist_rows.tolist()
        row_bytes = cache.nbytes // (len(samples) * cache.layers[0].gist.key.shape[2])
        said = self.ask(cache, samples)
        return [(text, count, count * row_bytes, row_bytes) for text, count in zip(said, rows, strict=True)]

    def compress(self, samples: Sequence[Sample]) -> GistCache:
        """The gist rows of the samples' contexts."""
        ids, mask = _padded(self.model, self.tokenizer, [sample.context for sample in samples], self.start)
        return compress(self.model, ids, mask, **self.compression)

    def ask(self, cache: GistCache, samples: Sequence[Sample]) -> list[str]:
        """What is said to the questions of the samples; the cache is used up."""
        ids, mask = _padded(self.model, self.tokenizer, [sample.question for sample in samples])
        return _generate(self, samples, ids, mask, past_key_values=cache)


class FullReader:
    """Answers with the whole context in sight: what the same questions score without compression.

    The model is not patched, or not for this: transformers' own attention and cache.
    """

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: Tokenizer, new_tokens: int | None = None, start: Sequence[int] = ()
    ) -> None:
        self.model, self.tokenizer, self.new_tokens, self.start = model, tokenizer, new_tokens, list(start)
        self.digest = _digest("full", self, {})

    def read(self, samples: Sequence[Sample]) -> list[tuple[str, int, int, int]]:
        """Context and question in one prompt."""
        texts = [sample.context + sample.question for sample in samples]
        ids, mask = _padded(self.model, self.tokenizer, texts, self.start)
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


def _padded(
    model: LlamaForCausalLM, tokenizer: Tokenizer, texts: Sequence[str], start: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (`start` and the text's) and attention mask on the model's device."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ids, mask = left_padded([torch.tensor([*start, *one.ids], device=model.device) for one in encoded])
    return ids, mask.long()


def _digest(how: str, reader: Any, compression: Mapping[str, int]) -> str:
    """Identity of weights, tokenizer and way of reading."""
    way = [how, compression, reader.new_tokens, *([reader.start] if reader.start else []), reader.tokenizer.to_str()]
    digest = hashlib.sha256(json.dumps(way, sort_keys=True).encode())
    for name, tensor in reader.model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
