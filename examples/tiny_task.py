"""The tiny preset's model and training batches."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from niah import KEY_DIGITS, Haystack
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from gistkern import GistHandle, GistLayout

__all__ = ["Batch", "answer_logits", "build_model", "make_batch"]

IGNORED = -100


def build_model(vocab_size: int, seed: int, rope_theta: float = 1e4) -> LlamaForCausalLM:
    """A Llama of about 230k parameters from random weights.

    `initializer_range` is the largest lever: at transformers' 0.02 so small a model stays on its plateau.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """Contexts cut into segments with their gists, then question and answer; the answer ends every row."""

    input_ids: torch.Tensor
    layout: GistLayout
    answers: torch.Tensor
    language: str


def make_batch(
    haystack: Haystack, handle: GistHandle, segments: int, segment_length: int, batch_size: int, rng: random.Random
) -> Batch:
    """`batch_size` samples of about `segments` segments, the last one ragged in length."""
    tokens = segments * segment_length - rng.randrange(segment_length // 4)
    question = haystack.encode(haystack.language.question)
    lengths = [segment_length] * (segments - 1) + [tokens - (segments - 1) * segment_length]
    rows, answers = [], []
    for _ in range(batch_size):
        ids, _, sample = haystack.draw(tokens)
        row: list[int] = []
        for index in range(segments):
            row += ids[index * segment_length : (index + 1) * segment_length] + handle.segment_gist_token_ids
        answer = haystack.encode(sample.answer)
        rows.append(row + handle.gist_token_ids + question + answer)
        answers.append(answer)
    layout = GistLayout.hierarchical(
        lengths,
        len(handle.segment_gist_token_ids),
        len(handle.gist_token_ids),
        tail=len(question) + KEY_DIGITS,
        sink_tokens=handle.sink_tokens,
    )
    layout = GistLayout.stack([layout] * batch_size)
    return Batch(torch.tensor(rows), layout, torch.tensor(answers), haystack.language.code)


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Logits ``[B, KEY_DIGITS, vocab]`` that predict the answer's digits, nothing else."""
    output = model(batch.input_ids, gist_layout=batch.layout, logits_to_keep=KEY_DIGITS + 1, use_cache=False)
    return output.logits[:, :-1]
