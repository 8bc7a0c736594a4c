"""What gist tokens are trained for: the answer, the context, the teacher that sees all (docs/guides/objectives.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gistkern.hf.handle import handle_of
from gistkern.layout import GistLayout
from gistkern.training.streams import Streams
from gistkern.training.tail import Tail, bare, tail_of, tail_of_batch

__all__ = ["Losses", "Objectives", "adapters_off", "answer_loss", "distillation_loss", "reconstruction_loss"]


def answer_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    layout: GistLayout | None = None,
    attention_mask: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross entropy of the labeled tokens: ``model(input_ids, labels=labels).loss`` without its logits.

    The head runs on the columns that predict a label only (transformers' `logits_to_keep`), so no
    ``[B, N, vocabulary]`` tensor exists. This is the loss of Mu et al. 2023, "Learning to Compress Prompts with
    Gist Tokens": instruction tuning under the gist mask.

    Parameters
    ----------
    model : nn.Module
        Patched by `gistkern.patch_llama`; wrapped by peft or DistributedDataParallel will do.
    input_ids, labels : Tensor
        int64 ``[B, N]``; -100 marks what is not predicted. Labels are not shifted: the token in front predicts.
    layout : GistLayout, optional
        By default read off the ids.
    attention_mask : Tensor, optional
        ``[B, N]``, 0 for padding.
    num_items : Tensor or int, optional
        Divisor of the sum; by default the number of labels (a Trainer passes that of all ranks and micro-batches).

    Raises
    ------
    ValueError
        If the model is not patched, the shapes differ, or nothing is labeled.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    ...                                      num_attention_heads=2, vocab_size=100))
    >>> handle = patch_llama(model, num_gist_tokens=2)
    >>> ids = torch.tensor([[5, 6, 7, *handle.gist_token_ids, 8, 9]])
    >>> labels = torch.where(torch.arange(7) < 6, -100, ids)
    >>> torch.allclose(answer_loss(model, ids, labels), model(ids, labels=labels).loss)
    True
    """
    return tail_of(model, input_ids, labels, layout, attention_mask).cross_entropy(num_items)


def reconstruction_loss(
    model: nn.Module,
    contexts: Sequence[torch.Tensor],
    spans: Sequence[torch.Tensor] | None = None,
    *,
    cue_ids: Sequence[int],
    segment_length: int | None = None,
    segment_overlap: int = 0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Autoencoding: the loss of repeating the context, or a span of it, from the gist rows alone.

    The stream is the context, its gist tokens, the cue, then the span, whose tokens are the labels. Source: Ge et
    al. 2023, "In-context Autoencoder for Context Compression in a Large Language Model", pretraining by
    autoencoding, where the cue is one learned token; here it is ordinary tokens, so nothing more is to be saved.

    Parameters
    ----------
    model : nn.Module
        As for `answer_loss`.
    contexts : sequence of Tensor
        int64 ``[tokens]`` each, without gist tokens, on the model's device or the CPU.
    spans : sequence of Tensor, optional
        What to say of each context (the needle's sentence, say); by default all of it.
    cue_ids : sequence of int
        Tokens that ask for it; at least one.
    segment_length, segment_overlap : int
        As for `gistkern.compress`.
    num_items : Tensor or int, optional
        As for `answer_loss`.

    Raises
    ------
    ValueError
        If the cue, a context or a span is empty or holds gist tokens, or `gistkern.compress` would refuse the
        segments.

    Examples
    --------
    >>> from gistkern.training import reconstruction_loss
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> context = tokenizer("The bell is with Mira.", return_tensors="pt").input_ids[0]
    >>> cue = tokenizer("Say it again:").input_ids
    >>> reconstruction_loss(model, [context], cue_ids=cue).item() > 0
    True
    """
    handle = handle_of(bare(model))
    streams = Streams.of(handle, segment_length, segment_overlap)
    given = {"context": contexts, "span": contexts if spans is None else spans, "cue": [torch.tensor(cue_ids)]}
    if len(given["span"]) != len(contexts):
        raise ValueError(f"spans lists {len(given['span'])} samples, contexts {len(contexts)}")
    parts = {name: [ids.cpu().long() for ids in many] for name, many in given.items()}
    for name, many in parts.items():
        for ids in many:
            if not len(ids) or streams.holds_gists(ids):
                raise ValueError(f"a {name} must hold at least one token and no gist token, got {ids.tolist()}")
    batch = streams.batch(parts["context"], parts["cue"] * len(contexts), parts["span"])
    device = handle.inner.get_input_embeddings().weight.device
    return tail_of_batch(model, {name: value.to(device) for name, value in batch.items()}).cross_entropy(num_items)


def distillation_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    teacher: Mapping[str, Any],
    temperature: float = 1.0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Distillation: KL divergence from predictions with the whole context in sight to those from the gist rows.

    The teacher is the model itself with its adapters off, reading context, question and answer without gist
    tokens, which a patched model does under the plain causal mask; no gradient reaches it. Distilling a context
    into a student that lacks it is Snell et al. 2022, "Learning by Distilling Context"; Mu et al. 2023 introduce
    gisting as its amortised form. Temperature and its square as a factor, which keeps the size of the gradients,
    are Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Parameters
    ----------
    model : nn.Module
        As for `answer_loss`. Without adapters the teacher is the student's own present weights.
    batch, teacher : mapping
        `input_ids`, `labels`, and where needed `attention_mask` and `gist_layout`, as `GistDataCollator` makes
        them with ``teacher=True``: the same labels behind two different contexts.
    temperature : float
        Of both distributions; positive.
    num_items : Tensor or int, optional
        As for `answer_loss`.

    Raises
    ------
    ValueError
        If the teacher's stream holds gist tokens, the labels of the two differ, or the temperature is not positive.

    Examples
    --------
    >>> from gistkern.training import GistDataCollator, distillation_loss
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> rows = [{"context": "The bell is with Mira.", "question": " Who has it?", "answer": " Mira"}]
    >>> batch = GistDataCollator(tokenizer, handle, teacher=True)(rows)
    >>> distillation_loss(model, batch, batch["teacher"], temperature=2.0).item() > 0
    True
    """
    _check_temperature(temperature)
    taught = _teacher_tail(model, teacher)  # first, while the student's graph does not fill memory yet
    return _divergence(tail_of_batch(model, batch), taught, temperature, num_items)


@torch.no_grad()
def _teacher_tail(model: nn.Module, batch: Mapping[str, Any], required: bool = True) -> Tail:
    base = bare(model)
    if bool(handle_of(base).is_gist(batch["input_ids"]).any()):
        raise ValueError("the teacher's stream holds gist tokens: it is context, question and answer alone")
    with adapters_off(base):
        return tail_of_batch(base, batch, required)


def _divergence(student: Tail, taught: Tail, temperature: float, num_items: torch.Tensor | int | None) -> torch.Tensor:
    if not torch.equal(student.labels[student.labeled()], taught.labels[taught.labeled()]):
        raise ValueError("student and teacher must predict the same labels, sample by sample: pass equal answers")
    log_q = (student.rows() / temperature).log_softmax(-1)
    p = (taught.rows() / temperature).softmax(-1)
    total = F.kl_div(log_q, p, reduction="sum") * temperature**2
    return total / (len(p) if num_items is None else num_items)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """peft adapters off, and back as they were, parameters that were frozen by hand included."""
    if not hasattr(model, "disable_adapter"):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "the adapter was added by model.add_adapter, whose way back leaves the gist rows switched off: "
                "wrap the model with peft.get_peft_model instead"
            )
        yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


@dataclass(frozen=True)
class Losses:
    """The weighted `total`, its unweighted `parts` by name, and the `tail` that the answer is read from."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]
    tail: Tail


@dataclass(frozen=True)
class Objectives:
    """The training loss: a weighted sum of answering, distillation and reconstruction. What weighs 0 is not computed.

    Called with a model and a batch of `GistDataCollator`, it returns `Losses`.

    Parameters
    ----------
    answer, distillation, reconstruction : float
        Weights. `distillation` needs a collator with ``teacher=True``, `reconstruction` one with a ``cue``.
    temperature : float
        Of the distillation.

    Raises
    ------
    ValueError
        For negative weights, if neither answer nor distillation weighs anything (to autoencode alone, make the
        cue the question and the context the answer), or if the batch lacks what a weight needs.

    Examples
    --------
    >>> from gistkern.training import GistDataCollator, Objectives
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> rows = [{"context": "The bell is with Mira.", "question": " Who has it?", "answer": " Mira"}]
    >>> batch = GistDataCollator(tokenizer, handle, teacher=True)(rows)
    >>> losses = Objectives(answer=1.0, distillation=0.5)(model, batch)
    >>> sorted(losses.parts), losses.total.requires_grad
    (['answer', 'distillation'], True)
    """

    answer: float = 1.0
    distillation: float = 0.0
    reconstruction: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("answer", "distillation", "reconstruction"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"the weight of {name} must be a number >= 0, got {getattr(self, name)!r}")
        if not self.answer and not self.distillation:
            raise ValueError(
                "answer and distillation both weigh 0: to train by reconstruction alone, make the cue the question "
                "and the context the answer"
            )
        _check_temperature(self.temperature)

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        num_items: torch.Tensor | int | None = None,
        reconstruction_items: torch.Tensor | int | None = None,
    ) -> Losses:
        """The losses of a batch; `num_items` and `reconstruction_items` as for `answer_loss`."""
        needs = (("distillation", "teacher", "teacher=True"), ("reconstruction", "reconstruction", "a cue"))
        for name, key, argument in needs:
            if getattr(self, name) and key not in batch:
                raise ValueError(f"{name} needs batch[{key!r}]: give the GistDataCollator {argument}")
        required = num_items is None  # counted elsewhere: some other process or micro-batch has labels
        taught = _teacher_tail(model, batch["teacher"], required) if self.distillation else None
        tail = tail_of_batch(model, batch, required)
        parts = {"answer": tail.cross_entropy(num_items)}
        if taught is not None:
            parts["distillation"] = _divergence(tail, taught, self.temperature, num_items)
        if self.reconstruction:
            again = tail_of_batch(model, batch["reconstruction"], reconstruction_items is None)
            parts["reconstruction"] = again.cross_entropy(reconstruction_items)
        weighted = [getattr(self, name) * value for name, value in parts.items() if getattr(self, name)]
        return Losses(torch.stack(weighted).sum(), {name: value.detach() for name, value in parts.items()}, tail)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
