"""Contexts with their gist tokens as training streams, cut exactly as `gistkern.compress` will cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gistkern.layout import GistLayout
from gistkern.layout.streams import check_segmentation, left_padded, segments_of

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["Streams", "labeled"]

IGNORED = -100  # transformers' label of a token that is not predicted


@dataclass(frozen=True)
class Streams:
    """How a patched model's contexts become streams. Holds its settings only, so that data workers can copy it.

    `segment_length` and `segment_overlap` are those of `gistkern.compress`.
    """

    gist_token_ids: tuple[int, ...]
    segment_gist_token_ids: tuple[int, ...]
    sink_tokens: int
    segment_length: int | None = None
    segment_overlap: int = 0

    @classmethod
    def of(cls, handle: GistHandle, segment_length: int | None = None, segment_overlap: int = 0) -> Streams:
        """The streams of the model of `handle`; ValueError for segments that `gistkern.compress` refuses."""
        check_segmentation(segment_length, segment_overlap)
        if handle.segment_gist_token_ids:
            if segment_length is None:
                raise ValueError("a model with num_segment_gist_tokens is trained in segments: pass segment_length")
            if handle.sink_tokens > segment_length:
                raise ValueError(
                    f"segment_length must be at least the {handle.sink_tokens} sink tokens, got {segment_length}"
                )
        ids, segment_ids = tuple(handle.gist_token_ids), tuple(handle.segment_gist_token_ids)
        return cls(ids, segment_ids, handle.sink_tokens, segment_length, segment_overlap)

    def holds_gists(self, ids: torch.Tensor) -> bool:
        """Whether any of `ids` is a gist token."""
        known = torch.tensor(self.gist_token_ids + self.segment_gist_token_ids)
        return bool(torch.isin(ids, known).any())

    def batch(
        self,
        contexts: Sequence[torch.Tensor],
        prompts: Sequence[torch.Tensor],
        answers: Sequence[torch.Tensor],
        pad_id: int = 0,
    ) -> dict[str, Any]:
        """One row per context, padded on the left: context with its gist tokens, prompt, answer.

        Parameters
        ----------
        contexts, prompts, answers : sequence of Tensor
            int64 ``[tokens]`` each, without gist tokens.
        pad_id : int
            Stands in front of the shorter rows; the attention mask hides it.

        Returns
        -------
        dict
            `input_ids`, `attention_mask` and `labels` (int64 ``[B, N]``; only the answers are labeled), and for
            a hierarchical scheme `gist_layout`: the other schemes are read off the ids.
        """
        cut = [self._segments(context) for context in contexts]
        tails = [torch.cat([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
        rows = [torch.cat([*self._with_gists(parts), tail]) for parts, tail in zip(cut, tails, strict=True)]
        batch: dict[str, Any] = labeled(rows, answers, pad_id)
        if self.segment_gist_token_ids:
            counts = len(self.segment_gist_token_ids), len(self.gist_token_ids)
            shapes = [(*map(len, parts), len(tail)) for parts, tail in zip(cut, tails, strict=True)]
            made = {  # rows of equal lengths have equal layouts
                shape: GistLayout.hierarchical(shape[:-1], *counts, tail=shape[-1], sink_tokens=self.sink_tokens)
                for shape in set(shapes)
            }
            batch["gist_layout"] = GistLayout.stack([made[shape] for shape in shapes], "left")
        return batch

    def _segments(self, context: torch.Tensor) -> list[torch.Tensor]:
        return segments_of(context, self.segment_length or len(context), self.segment_overlap)

    def _with_gists(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        ends = torch.tensor(self.segment_gist_token_ids or self.gist_token_ids)
        stream = [piece for part in parts for piece in (part, ends)]
        return [*stream, torch.tensor(self.gist_token_ids)] if self.segment_gist_token_ids else stream


def labeled(rows: Sequence[torch.Tensor], answers: Sequence[torch.Tensor], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` of rows that each end in their answer."""
    ids, mask = left_padded(rows, pad_id)
    answer = torch.tensor([len(one) for one in answers])[:, None]
    labels = torch.where(torch.arange(ids.shape[1]) >= ids.shape[1] - answer, ids, IGNORED)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
