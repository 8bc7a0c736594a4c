"""Gist tokens are never predicted: their labels become -100, and a Trainer's count of labels is put right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["ignore_gists"]

IGNORED = -100
_ADVICE = (
    "and gist tokens are never predicted. Set their labels to -100 before they are counted: "
    "trainer.data_collator = gistkern.training.ignore_gist_labels(trainer.data_collator, handle)"
)


def ignore_gists(handle: GistHandle, arguments: dict[str, Any]) -> None:
    """Set labels of gist tokens to -100 among the arguments of a model's call, in place.

    A Trainer divides the sum over a step by the labels that it counted before this call (`num_items_in_batch`), gist
    tokens among them.

    Raises
    ------
    ValueError
        If there were gist tokens among them and the step has other micro-batches, whose labels are not to be seen here,
        or TRL's fused head is trained, which leaves the division to a trainer that has counted them too. If the loss
        would hold the experts' balance over a part of a context.
    """
    given = {name: arguments[name] for name in ("labels", "shift_labels") if torch.is_tensor(arguments.get(name))}
    kept = {name: labels.masked_fill(handle.is_gist(labels), IGNORED) for name, labels in given.items()}
    arguments.update(kept)
    if given and handle.context_parallel is not None:
        _refuse_balance(handle, arguments)
    if arguments.get("fused_lm_head") and handle.model.training:
        if any(not torch.equal(labels, kept[name]) for name, labels in given.items()):
            raise ValueError(f"the labels of this step were counted with gist tokens among them, {_ADVICE}")
        return
    items = arguments.get("num_items_in_batch")
    if items is None or not given:
        return
    # the ways of transformers' Trainer, by version and collator: shifted labels, labels without the first, all labels
    counts = [[_count(each[name]) for each in (given, kept)] for name in given]
    if "labels" in given:
        counts.append([_count(each["labels"][..., 1:]) for each in (given, kept)])
    pairs = torch.stack([torch.stack(pair) for pair in counts]).tolist()
    if all(counted == left for counted, left in pairs):
        return
    for counted, left in pairs:
        if counted == int(items):
            arguments["num_items_in_batch"] = torch.full_like(torch.as_tensor(items), left)
            return
    raise ValueError(
        f"num_items_in_batch is {int(items)}: the labels of a whole step (micro-batches, processes), counted with gist "
        f"tokens among them, {_ADVICE}"
    )


def _refuse_balance(handle: GistHandle, arguments: dict[str, Any]) -> None:
    """Experts are balanced over a whole context, of which a rank sees its shard."""
    asked = arguments.get("output_router_logits")
    if getattr(handle.model.config, "output_router_logits", False) if asked is None else asked:
        raise ValueError(
            "the experts' balance loss is not that of the whole context on a model patched with context_parallel: pass "
            "output_router_logits=False"
        )


def _count(labels: torch.Tensor) -> torch.Tensor:
    return labels.ne(IGNORED).sum()
