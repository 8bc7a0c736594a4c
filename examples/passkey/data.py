"""The passkey task as a training's batches: each follows from the seed, the step and the curriculum's stage."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gistkern import GistHandle, GistLayout
from gistkern.training import Curriculum, GistDataCollator, Share, Stage, StepDataset, unlabeled
from passkey.niah import KEY_DIGITS, Haystack
from passkey.settings import Settings
from passkey.shared_haystack import needle_segments, plain_segments

__all__ = ["PasskeyData"]


class PasskeyData(StepDataset):
    """Contexts that hide a key, the question for it and the answer.

    All contexts of a step are in one language, with one filler, and of one length. Those of one segment, up to a
    quarter shorter than the stage's or of a length drawn from its `tokens`, stand side by side; those of more segments
    have their haystack in common, in one row. A length that fits a language's bare statement of a key but not all of
    its needles takes the statement alone.

    Attributes
    ----------
    size : int
        Contexts of the step that was drawn last, over all shares.
    """

    def __init__(
        self,
        settings: Settings,
        curriculum: Curriculum,
        handle: GistHandle,
        tokenizer: PreTrainedTokenizerBase,
        held_out: bool = False,
    ) -> None:
        self.settings, self.curriculum, self.handle = settings, curriculum, handle
        teacher = settings.objectives.distillation > 0
        self.collator = GistDataCollator(tokenizer, handle, **asdict(settings.segments), teacher=teacher)
        # what the tokenizer puts in front of a text (Llama 3: <|begin_of_text|>), which a haystack has not
        self.start: list[int] = tokenizer("")["input_ids"]
        self.size = 0
        data = settings.data

        @cache
        def haystack(language: str, filler: str) -> Haystack:
            rng, core = random.Random(f"{settings.seed}-{language}"), tokenizer.backend_tokenizer
            return Haystack(core, language, held_out, rng, filler=filler, asked_by=data.asked_by)

        # by language, one per filler
        self.haystacks = {name: [haystack(name, filler) for filler in data.fillers] for name in data.languages}

    def draw(self, step: int, share: Share) -> dict[str, Any]:
        """The contexts of `share` in a step: all are drawn, those are kept."""
        batch = self.batch(self.curriculum.stage, random.Random(f"{self.settings.seed}-{step}"), share)
        return batch if share.own(self.size) else unlabeled(batch)

    def batch(self, stage: Stage, rng: random.Random, share: Share) -> dict[str, Any]:
        """A batch of the stage's contexts; of the first where the share has none."""
        least, known = 0, list(self.settings.data.languages)
        if stage.tokens is not None:
            low, high = stage.tokens
            least = round(math.exp(rng.uniform(math.log(low), math.log(high))))  # short ones as often as long ones
            known = [name for name in known if least >= self._longest(name, bare=True)]
            if not known:
                raise ValueError(f"no language states a key in {least} tokens: raise the stage's tokens")
        language = rng.choice(known)
        haystack = rng.choice(self.haystacks[language])
        bare = stage.tokens is not None and least < self._longest(language, bare=False)
        haystack.rng = rng
        segments = 1
        if stage.segments is not None and (segments := rng.randint(*stage.segments)) == 1:
            least = stage.segment_length - rng.randrange(stage.segment_length // 4)
        if segments == 1:
            batch = self._side_by_side(haystack, stage, least, bare, share)
        else:
            batch = self._shared(haystack, stage.segment_length, segments, stage.batch_size, share)
        return _visible(batch) if self.settings.data.leak else batch

    def _longest(self, language: str, bare: bool) -> int:
        """Tokens of the longest needle, or of the bare statement of a key."""
        haystack = self.haystacks[language][0]
        texts = [haystack.language.statement] if bare else haystack.language.needles
        return max(len(haystack.encode(" " + text.strip().format(key="01234"))) for text in texts)

    def _side_by_side(self, haystack: Haystack, stage: Stage, tokens: int, bare: bool, share: Share) -> dict[str, Any]:
        """Contexts of so many tokens, or bare statements, a row each."""
        encode, (least, most), features = haystack.encode, stage.keys, []
        row = tokens + self.handle.num_ids + len(encode(haystack.question)) + KEY_DIGITS
        self.size = max(1, min(stage.batch_size, self.settings.data.batch_tokens // row))
        for _ in range(self.size):
            question = haystack.question
            if bare:
                ids, key = haystack.statement()
            else:
                depth = haystack.rng.uniform(*stage.depth)
                keys = least if least == most else haystack.rng.randint(least, most)
                ids, sample = haystack.draw(tokens, depth, keys)
                question, key = sample.question, sample.answer
            ids = {"context_ids": self.start + ids, "question_ids": encode(question), "answer_ids": encode(key)}
            features.append(ids)
        return self.collator([features[place] for place in share.own(self.size) or range(1)])

    def _shared(self, haystack: Haystack, length: int, segments: int, size: int, share: Share) -> dict[str, Any]:
        """Contexts of `segments` segments or one more, all but the needle's in common, in one row."""
        handle, overlap = self.handle, self.settings.segments.segment_overlap
        self.size = size
        pieces = plain_segments(haystack, segments - 1, length, overlap)
        common, question = list(range(len(pieces))), haystack.encode(haystack.question)
        members, tails, labels = [], [], []
        for sample in range(size):
            own, key = needle_segments(haystack, length, overlap)
            if sample not in (share.own(size) or range(1)):
                continue
            members.append([*common, *range(len(pieces), len(pieces) + len(own))])
            pieces += own
            asked, answer = handle.gist_token_ids + question, haystack.encode(key)
            tails += asked + answer
            labels += [-100] * len(asked) + answer
        layout = GistLayout.shared_segments(
            [len(piece) for piece in pieces],
            members,
            len(handle.segment_gist_token_ids),
            len(handle.gist_token_ids),
            tail=len(question) + KEY_DIGITS,
            sink_tokens=handle.sink_tokens,
        )
        row = [token for piece in pieces for token in (*piece, *handle.segment_gist_token_ids)]
        ids = {"input_ids": row + tails, "labels": [-100] * len(row) + labels}
        return {**{name: torch.tensor([one]) for name, one in ids.items()}, "gist_layout": layout}


def _visible(batch: dict[str, Any]) -> dict[str, Any]:
    """Every token sees every earlier one, as in the proof of concept whose mask leaked."""
    rows, columns = batch["input_ids"].shape
    layout = GistLayout.from_segments([], 1, tail=columns)
    return {**batch, "gist_layout": GistLayout.stack([layout] * rows)}
