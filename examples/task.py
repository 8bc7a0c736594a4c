"""The passkey task as token batches, and the model that the tiny preset trains on it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gistkern import GistHandle, GistLayout
from niah import KEY_DIGITS, Haystack
from presets import Preset, Stage

__all__ = ["Batch", "answer_logits", "build_model", "make_batch"]


def build_model(preset: Preset, seed: int) -> LlamaForCausalLM:
    """A Llama of about 230k parameters with random weights.

    `initializer_range` is the largest lever: at transformers' 0.02 so small a model stays on its plateau.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=preset.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """Contexts in segments with their gists, then summary gists, question and answer; the answer ends every row."""

    input_ids: torch.Tensor
    layout: GistLayout
    answers: torch.Tensor


def make_batch(haystack: Haystack, handle: GistHandle, stage: Stage, rng: random.Random) -> Batch:
    """A batch of one length; the last segment is up to a quarter shorter than the others."""
    segments, length = rng.randint(*stage.segments), stage.segment_length
    tokens = segments * length - rng.randrange(length // 4)
    question = haystack.encode(haystack.language.question)
    rows, answers = [], []
    for _ in range(stage.batch_size):
        ids, sample = haystack.draw(tokens)
        row: list[int] = []
        for begin in range(0, tokens, length):
            row += ids[begin : begin + length] + handle.segment_gist_token_ids
        answer = haystack.encode(sample.answer)
        rows.append(row + handle.gist_token_ids + question + answer)
        answers.append(answer)
    layout = GistLayout.hierarchical(
        [length] * (segments - 1) + [tokens - (segments - 1) * length],
        len(handle.segment_gist_token_ids),
        len(handle.gist_token_ids),
        tail=len(question) + KEY_DIGITS,
        sink_tokens=handle.sink_tokens,
    )
    return Batch(torch.tensor(rows), GistLayout.stack([layout] * stage.batch_size), torch.tensor(answers))


def answer_logits(model: LlamaForCausalLM, batch: Batch, leak: bool = False) -> torch.Tensor:
    """Logits ``[B, KEY_DIGITS, vocab]`` that predict the answer's digits, nothing else.

    With `leak` every token sees every earlier one, as in the proof of concept whose mask leaked.
    """
    layout = batch.layout
    if leak:
        everything = GistLayout.from_segments([], 1, tail=layout.num_rows)
        layout = GistLayout.stack([everything] * layout.batch_size)
    output = model(batch.input_ids, gist_layout=layout, logits_to_keep=KEY_DIGITS + 1, use_cache=False)
    return output.logits[:, :-1]
