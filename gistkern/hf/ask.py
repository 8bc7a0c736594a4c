"""`ask`: a context and a question in, an answer out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gistkern.cache.cache import GistCache
from gistkern.cache.offload import input_device
from gistkern.cache.ranking import check_scorer
from gistkern.hf.chat import chat_context, question_after, stop_ids
from gistkern.hf.compress import compress
from gistkern.hf.handle import handle_of
from gistkern.hf.texts import check_prefix, context_ids, text_ids
from gistkern.layout.arguments import check_count
from gistkern.layout.streams import left_padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["answer", "ask", "compressed"]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str | GistCache,
    question: str | Sequence[str],
    *,
    chat: str | bool | None = None,
    restore: int = 0,
    scorer: str = "attention",
    **generate: Any,
) -> Any:
    """Compress a context into gist rows and answer questions from those, alone or with a few segments' raw rows.

    Contexts are begun, cut and put into the chat template as in training, as far as the model knows
    (``handle.training``, see `gistkern.load`).

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
    chat : str or bool, optional
        Whether context and question go through the chat template, and whose turn the context begins: ``"user"`` (a
        document in front of the question), ``"system"`` (a system prompt), False for neither; by default as in
        training.
    restore : int
        For each question bring back the raw rows of so many segments, chosen by `scorer`, as `GistCache.restore` does.
        A GistCache must hold raw rows then; of a text they are kept in memory meanwhile.
    scorer : str
        ``"attention"``, ``"bm25"`` or ``"union"``, where segments are restored.
    **generate
        For ``model.generate``. By default greedy, and at most 64 new tokens.

    Returns
    -------
    str or list of str
        The answer, or one for each question, without special tokens. A list too if `generate` gives several answers.

    Raises
    ------
    ValueError
        If the model is not patched, the tokenizer begins contexts otherwise than in training, a text is empty or holds
        gist tokens, the chat template does not leave contexts as they are, or there are no raw rows to restore.
    TypeError
        If a question is no text, or the context neither a text nor a GistCache.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> questions = ["Who has it?", "Which bell?"]
    >>> answers = gistkern.ask(model, tokenizer, "The bell is with Mira.", questions, max_new_tokens=4)
    >>> [type(answer).__name__ for answer in answers]
    ['str', 'str']
    """
    handle = handle_of(model)
    check_prefix(handle.training.context_prefix, tokenizer, "the model's training")
    role = handle.training.role_for(chat)
    if not isinstance(context, str | GistCache):
        raise TypeError(f"the context must be a text or a GistCache, got {type(context).__name__}")
    questions = [question] if isinstance(question, str) else list(question)
    if wrong := [one for one in questions if not isinstance(one, str)]:
        raise TypeError(f"a question must be a text, got {type(wrong[0]).__name__}")
    if not questions or not all(map(str.strip, questions)):
        raise ValueError("there is nothing to answer: a question is empty, or there is none")
    asked = [text_ids(tokenizer, question_after(tokenizer, one, role)) for one in questions]
    check_count("restore", restore)
    check_scorer(scorer)
    cache = compressed(model, tokenizer, context, role, keep_raw="cpu" if restore else None)
    if restore:
        cache = cache.restore(model, asked, restore, scorer=scorer)
    else:
        cache = cache.clone() if len(questions) == 1 else cache.shared()
    answers = answer(model, tokenizer, asked, cache, role is not None, generate)
    said = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return said[0] if isinstance(question, str) and len(said) == 1 else said


def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    asked: Sequence[Sequence[int]],
    cache: GistCache,
    chat: bool,
    options: dict[str, Any],
) -> list[list[int]]:
    """New token ids behind each of `asked`, which follow the cached context; greedy unless `options` say otherwise."""
    handle = handle_of(model)
    device = input_device(handle.inner)
    ids, mask = left_padded([torch.tensor(one, device=device) for one in asked], _pad_id(tokenizer))
    if bool((handle.is_gist(ids) & mask).any()):
        raise ValueError("a question holds gist tokens, spelled out in its text: take them out")
    default: dict[str, Any] = {}
    if "generation_config" not in options:
        default = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": stop_ids(model, tokenizer, chat) or None}
        if not options.get("do_sample"):  # a checkpoint's own settings of sampling, which would be warned of
            default |= {"temperature": None, "top_p": None, "top_k": None}
    options = {"pad_token_id": _pad_id(tokenizer), **default, **options}
    said: Any = model.generate(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, **options)  # type: ignore[operator]
    found: list[list[int]] = (said if torch.is_tensor(said) else said.sequences)[:, ids.shape[1] :].tolist()
    return found


def compressed(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str | GistCache,
    role: str | None,
    keep_raw: str | None = None,
) -> GistCache:
    """A text as in training (None: without the chat template), cut as in training."""
    if isinstance(context, GistCache):
        return context
    if not context.strip():
        raise ValueError("the context is empty: there is nothing to ask about")
    ids = context_ids(tokenizer, chat_context(tokenizer, context, role))
    trained = handle_of(model).training
    length, overlap = trained.segment_length, trained.segment_overlap
    return compress(model, [ids], segment_length=length, segment_overlap=overlap, keep_raw=keep_raw)


def _pad_id(tokenizer: Any) -> int:
    """Hidden by the mask: any id will do."""
    found: int | None = getattr(tokenizer, "pad_token_id", None)
    return 0 if found is None else found
