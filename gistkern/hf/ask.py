"""`ask`: a context and a question in, an answer out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gistkern.cache.cache import GistCache
from gistkern.cache.offload import input_device
from gistkern.hf.compress import compress
from gistkern.hf.handle import handle_of
from gistkern.hf.texts import check_prefix, context_ids, text_ids
from gistkern.layout.streams import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ask"]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str | GistCache,
    question: str | Sequence[str],
    **generate: Any,
) -> Any:
    """Compress a context into gist rows and answer questions from those alone.

    Contexts are cut and begun as in training, as far as the model knows (``handle.training``, `gistkern.load`).

    Parameters
    ----------
    model : PreTrainedModel
        Patched and trained; a peft wrapper around it will do.
    tokenizer : PreTrainedTokenizerBase
        That of the training.
    context : str or GistCache
        The text, or what `gistkern.compress` or a `GistStore` made of it, which stays as it is.
    question : str or sequence of str
        What follows the context, as in training. Several are answered together.
    **generate
        For ``model.generate``. By default greedy, and at most 64 new tokens.

    Returns
    -------
    str or list of str
        The answer, or one for each question, without special tokens.

    Raises
    ------
    ValueError
        If the model is not patched, the tokenizer begins contexts otherwise than in training, or a text is empty.

    Examples
    --------
    ::

        model, tokenizer, handle = gistkern.load("runs/mine")
        gistkern.ask(model, tokenizer, text, ["Who signed it?", "When?"], max_new_tokens=20)
    """
    handle = handle_of(model)
    check_prefix(handle.training.context_prefix, tokenizer, "the model's training")
    questions = [question] if isinstance(question, str) else list(question)
    asked = [text_ids(tokenizer, one) for one in questions]
    if not asked or not all(asked):
        raise ValueError("there is nothing to answer: a question is empty, or there is none")
    cache = _compressed(model, tokenizer, context)
    cache = cache.clone() if len(asked) == 1 else cache.shared()
    device = input_device(handle.inner)
    ids, mask = left_padded([torch.tensor(one, device=device) for one in asked], _pad_id(tokenizer))
    greedy = {} if "generation_config" in generate else {"do_sample": False, "max_new_tokens": 64}
    if not {"generation_config", "do_sample"} & generate.keys():  # of a checkpoint's generation_config, unused
        greedy |= {"temperature": None, "top_p": None, "top_k": None}
    options = {"pad_token_id": _pad_id(tokenizer), **greedy, **generate}
    said = model.generate(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, **options)
    ids = said if torch.is_tensor(said) else said.sequences
    answers = tokenizer.batch_decode(ids[:, mask.shape[1] :], skip_special_tokens=True)
    return answers[0] if isinstance(question, str) and len(answers) == 1 else answers


def _compressed(model: PreTrainedModel, tokenizer: Any, context: str | GistCache) -> GistCache:
    if isinstance(context, GistCache):
        return context
    ids = context_ids(tokenizer, context)
    if not ids:
        raise ValueError("the context is empty: there is nothing to ask about")
    trained = handle_of(model).training
    return compress(model, [ids], segment_length=trained.segment_length, segment_overlap=trained.segment_overlap)


def _pad_id(tokenizer: Any) -> int:
    """Hidden by the mask: any id will do."""
    found: int | None = getattr(tokenizer, "pad_token_id", None)
    return 0 if found is None else found
