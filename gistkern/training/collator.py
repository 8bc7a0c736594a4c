"""`GistDataCollator`: contexts, questions and answers become the batches that a patched model trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gistkern.hf.texts import check_prefix, context_ids, context_prefix, text_ids
from gistkern.training.streams import Streams, labeled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gistkern.hf.handle import GistHandle

__all__ = ["GistDataCollator"]

_PARTS = ("context", "question", "answer")


class GistDataCollator:
    """Collate contexts, questions and answers into batches that train what `compress` and decoding compute later.

    A feature holds `context_ids`, `question_ids` and `answer_ids` (token ids), or with a tokenizer their texts
    `context`, `question` and `answer`. A context begins with the special tokens that the tokenizer puts in front of a
    text (BOS), once, as in `gistkern.compress_corpus`; question and answer get none but those they spell out. A row of
    the batch is the context with its gist tokens, the question, the answer; padding stands on the left; only the
    answer is labeled.

    Parameters
    ----------
    tokenizer_or_pad_id : PreTrainedTokenizerBase or int
        Tokenises texts and names the padding token; or its id alone.
    handle : GistHandle
        What `gistkern.patch_llama` returned. Only its settings are kept, so that data workers can copy the collator.
    segment_length, segment_overlap : int
        How contexts are cut; pass the same to `gistkern.compress` later. Without a length a context is one segment.
        On a model with ``num_segment_gist_tokens`` the segments are summarized (hierarchical).
    teacher : bool
        Also make `batch["teacher"]`, context, question and answer without gist tokens: what distillation needs.
    cue : str or sequence of int, optional
        Also make `batch["reconstruction"]`: the context with its gist tokens, this cue, and what is to be said
        again: the feature's `span_ids` (or `span`) where the features have one, else the context.

    Returns
    -------
    dict
        `input_ids`, `attention_mask`, `labels` (int64 ``[B, N]``), `gist_layout` for the hierarchical scheme, and
        `teacher` and `reconstruction` (dicts of the same kind) where asked for.

    Raises
    ------
    ValueError
        For segments that `gistkern.compress` refuses; for a field that is unknown, missing, empty, given twice, no
        list of ids or holds gist tokens; for texts without a tokenizer, and a tokenizer that begins contexts otherwise
        than the model was trained.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from gistkern.training import GistDataCollator
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...                                      num_attention_heads=2, vocab_size=100))
    >>> collate = GistDataCollator(0, patch_llama(model, num_gist_tokens=2))
    >>> batch = collate([{"context_ids": [5, 6, 7], "question_ids": [8], "answer_ids": [9, 1]}])
    >>> batch["input_ids"]
    tensor([[  5,   6,   7, 100, 101,   8,   9,   1]])
    >>> batch["labels"]
    tensor([[-100, -100, -100, -100, -100, -100,    9,    1]])
    """

    def __init__(
        self,
        tokenizer_or_pad_id: PreTrainedTokenizerBase | int,
        handle: GistHandle,
        segment_length: int | None = None,
        segment_overlap: int = 0,
        teacher: bool = False,
        cue: str | Sequence[int] | None = None,
    ) -> None:
        # a Trainer saves the tokenizer of its collator beside the model
        self.tokenizer: Any = None
        pad_id: Any = tokenizer_or_pad_id
        if not isinstance(pad_id, int):
            self.tokenizer, pad_id = tokenizer_or_pad_id, pad_id.pad_token_id
        self.pad_id: int = 0 if pad_id is None else pad_id  # hidden by the mask: any id will do
        self.prefix: list[int] | None = None  # what contexts begin with; None where nobody knows
        if self.tokenizer is not None:
            check_prefix(handle.training.context_prefix, self.tokenizer, "the model's training")
            self.prefix = context_prefix(self.tokenizer)
        self.streams = Streams.of(handle, segment_length, segment_overlap)
        self.teacher = teacher
        self.cue = None
        if cue is not None:
            self.cue = self._ids("the cue", "cue" if isinstance(cue, str) else "cue_ids", cue)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all fields that features may have."""
        parts = _PARTS if self.cue is None else (*_PARTS, "span")
        return tuple(f"{part}_ids" for part in parts) + (parts if self.tokenizer is not None else ())

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate `features`."""
        samples = self.parts(features)
        contexts, questions, answers = ([sample[part] for sample in samples] for part in _PARTS)
        batch = self.streams.batch(contexts, questions, answers, self.pad_id)
        if self.teacher:
            rows = [torch.cat([sample[part] for part in _PARTS]) for sample in samples]
            batch["teacher"] = labeled(rows, answers, self.pad_id)
        if self.cue is not None:
            spans = [sample["span"] for sample in samples if "span" in sample]
            if spans and len(spans) != len(samples):
                raise ValueError(f"{len(spans)} of {len(samples)} features have a span: give it to all or to none")
            cues = [self.cue] * len(samples)
            batch["reconstruction"] = self.streams.batch(contexts, cues, spans or contexts, self.pad_id)
        return batch

    def parts(self, features: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """`context`, `question`, `answer` and `span` of each feature, checked, as int64 ``[tokens]`` on the CPU."""
        if not features:
            raise ValueError("there is nothing to collate: the list of features is empty")
        return [self._sample(place, feature) for place, feature in enumerate(features)]

    def _sample(self, place: int, feature: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The parts of a feature as ids."""
        where = f"feature {place}"
        unknown = [name for name in feature if name not in self.fields]
        if unknown:
            why = ""
            if self.tokenizer is None and set(unknown) <= {*_PARTS, "span"}:
                why = " (texts need a tokenizer instead of the padding id)"
            elif self.cue is None and set(unknown) <= {"span", "span_ids"}:
                why = " (a span is read where the collator has a cue)"
            raise ValueError(f"{where} has unknown fields {unknown}{why}: expected some of {list(self.fields)}")
        sample = {}
        for part in (*_PARTS, "span"):
            given = [name for name in (f"{part}_ids", part) if name in feature]
            if len(given) > 1:
                raise ValueError(f"{where} has both {given[0]} and {given[1]}: pass one of them")
            if given:
                sample[part] = self._ids(where, given[0], feature[given[0]])
            elif part != "span":
                hint = "" if feature else ": a plain Trainer drops them, unless it has remove_unused_columns=False"
                raise ValueError(f"{where} lacks {part}_ids: got {sorted(feature)}{hint}")
        return sample

    def _ids(self, where: str, name: str, value: Any) -> torch.Tensor:
        """Ids, or a text as ids; int64 ``[tokens]``."""
        if not name.endswith("_ids"):
            if self.tokenizer is None:
                raise ValueError(f"{name} is a text, which needs a tokenizer instead of the padding id: pass ids")
            try:
                value = (context_ids if name == "context" else text_ids)(self.tokenizer, value)
            except ValueError as error:
                raise ValueError(f"{name} of {where}: {error}") from error
        try:
            ids = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} of {where} must be a list of token ids, got {value!r:.80}: {error}") from error
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"{name} of {where} must be a list of at least one token, got shape {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{name} of {where} must be token ids, got {ids.dtype}")
        if bool((ids < 0).any()):
            raise ValueError(f"{name} of {where} must be token ids, got {int(ids.min())}")
        if self.streams.holds_gists(ids):
            raise ValueError(f"{name} of {where} holds gist tokens: pass raw tokens, the gist tokens are added here")
        return ids.long().cpu()
