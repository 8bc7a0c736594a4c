"""The passkey task as token batches."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import nn

from gistkern import GistHandle, GistLayout
from gistkern.training import Stage
from passkey.niah import KEY_DIGITS, Haystack
from passkey.shared_haystack import needle_segments, plain_segments
from presets import Preset
from ranks import WHOLE, Share

__all__ = ["Batch", "Haystacks", "answer_logits", "haystacks", "make_batch"]

# by language, one per filler of the preset
Haystacks = Mapping[str, list[Haystack]]


def haystacks(settings: Preset, tokenizer: Tokenizer, held_out: bool, seed: str) -> Haystacks:
    """The haystacks that a preset draws from."""
    made = {
        (language, filler): Haystack(
            tokenizer,
            language,
            held_out,
            random.Random(f"{seed}-{language}"),
            filler=filler,
            asked_by=settings.asked_by,
        )
        for language in set(settings.languages)
        for filler in set(settings.fillers)
    }
    return {language: [made[language, filler] for filler in settings.fillers] for language in settings.languages}


@dataclass(frozen=True)
class Batch:
    """Contexts in segments with their gists, then summary gists, question and answer.

    `predictors` are the places in each row of ids whose logits predict the digits of its `answers`
    ``[samples, KEY_DIGITS]``, sample after sample. `size` counts the samples drawn, `weight` is the part of these in
    it.
    """

    input_ids: torch.Tensor
    layout: GistLayout
    predictors: torch.Tensor
    answers: torch.Tensor
    size: int
    weight: float


def make_batch(
    drawn: Haystacks, handle: GistHandle, stage: Stage, settings: Preset, rng: random.Random, share: Share = WHOLE
) -> Batch:
    """A batch of the stage's contexts, in one language and one filler: all are drawn, those of `share` are kept.

    Contexts of one segment, up to a quarter shorter than the stage's length or of a length drawn from its `tokens`,
    stand side by side; of more segments they have their haystack in common. A length that fits a language's bare
    statement of a key but not all of its needles takes the statement alone.
    """
    least, known = 0, list(settings.languages)
    if stage.tokens is not None:
        low, high = stage.tokens
        least = round(math.exp(rng.uniform(math.log(low), math.log(high))))  # short ones as often as long ones
        known = [name for name in known if least >= _longest(drawn[name][0], (drawn[name][0].language.statement,))]
        if not known:
            raise ValueError(f"no language states a key in {least} tokens: raise the stage's tokens")
    haystack = rng.choice(drawn[rng.choice(known)])
    bare = stage.tokens is not None and least < _longest(haystack, haystack.language.needles)
    haystack.rng = rng
    if stage.segments is not None:
        segments = rng.randint(*stage.segments)
        if segments > 1:
            return _shared(haystack, handle, stage, segments, settings.segment_overlap, share)
        assert stage.segment_length is not None
        least = stage.segment_length - rng.randrange(stage.segment_length // 4)
    row = least + handle.num_ids + len(haystack.encode(haystack.question)) + KEY_DIGITS
    size = max(1, min(stage.batch_size, settings.batch_tokens // row))
    return _side_by_side(haystack, handle, None if bare else least, size, share)


def _longest(haystack: Haystack, statements: Sequence[str]) -> int:
    return max(len(haystack.encode(" " + statement.strip().format(key="01234"))) for statement in statements)


def _side_by_side(haystack: Haystack, handle: GistHandle, tokens: int | None, size: int, share: Share) -> Batch:
    """Contexts of one segment; without `tokens` they are bare statements of a key."""
    own = share.own(size)
    question = haystack.encode(haystack.question)
    rows, answers = [], []
    for _ in range(size):
        if tokens is None:
            ids, key = haystack.statement()
        else:
            ids, sample = haystack.draw(tokens)
            key = sample.answer
        answers.append(haystack.encode(key))
        rows.append(ids + handle.segment_gist_token_ids + handle.gist_token_ids + question + answers[-1])
    gists, tail = len(handle.gist_token_ids), len(question) + KEY_DIGITS
    if handle.segment_gist_token_ids:
        layout = GistLayout.hierarchical(
            [len(ids)], len(handle.segment_gist_token_ids), gists, tail=tail, sink_tokens=handle.sink_tokens
        )
    else:
        layout = GistLayout.from_segments([len(ids)], gists, tail=tail, sink_tokens=handle.sink_tokens)
    end = layout.num_rows - 1
    predictors = torch.arange(end - KEY_DIGITS, end)
    rows, answers, weight = [rows[i] for i in own], [answers[i] for i in own], share.weight(size)
    return Batch(
        torch.tensor(rows), GistLayout.stack([layout] * len(own)), predictors, torch.tensor(answers), size, weight
    )


def _shared(haystack: Haystack, handle: GistHandle, stage: Stage, segments: int, overlap: int, share: Share) -> Batch:
    """Contexts of `segments` segments or one more, all but the needle's in common, in one row."""
    own_samples = share.own(stage.batch_size)
    pieces = plain_segments(haystack, segments - 1, stage.segment_length, overlap)
    question = haystack.encode(haystack.question)
    common = list(range(len(pieces)))
    members, tails, answers = [], [], []
    for sample in range(stage.batch_size):
        own, key = needle_segments(haystack, stage.segment_length, overlap)
        if sample not in own_samples:
            continue
        members.append([*common, *range(len(pieces), len(pieces) + len(own))])
        pieces += own
        answers.append(haystack.encode(key))
        tails += handle.gist_token_ids + question + answers[-1]
    layout = GistLayout.shared_segments(
        [len(piece) for piece in pieces],
        members,
        len(handle.segment_gist_token_ids),
        len(handle.gist_token_ids),
        tail=len(question) + KEY_DIGITS,
        sink_tokens=handle.sink_tokens,
    )
    row = [token for piece in pieces for token in (*piece, *handle.segment_gist_token_ids)] + tails
    ends = torch.arange(len(members))[:, None] * (len(tails) // len(members)) + len(row) - len(tails)
    before = len(handle.gist_token_ids) + len(question) - 1
    predictors = (ends + before + torch.arange(KEY_DIGITS)).flatten()
    return Batch(
        torch.tensor([row]), layout, predictors, torch.tensor(answers), stage.batch_size, share.weight(stage.batch_size)
    )


def answer_logits(model: nn.Module, batch: Batch, leak: bool = False) -> torch.Tensor:
    """Logits ``[samples, KEY_DIGITS, vocab]`` that predict the answers' digits, nothing else.

    With `leak` every token sees every earlier one, as in the proof of concept whose mask leaked.
    """
    layout = batch.layout
    if leak:
        everything = GistLayout.from_segments([], 1, tail=layout.num_rows)
        layout = GistLayout.stack([everything] * layout.batch_size)
    output = model(batch.input_ids, gist_layout=layout, logits_to_keep=batch.predictors, use_cache=False)
    return output.logits.view(len(batch.answers), KEY_DIGITS, -1)
