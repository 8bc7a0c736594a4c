"""`Chat`: turn after turn behind a context that was compressed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gistkern.cache.tokens_read import ContextRead
from gistkern.hf.ask import answer, compressed
from gistkern.hf.chat import chat_context, prompt_parts
from gistkern.hf.handle import handle_of
from gistkern.hf.texts import check_prefix, context_ids, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gistkern.cache.cache import GistCache

__all__ = ["Chat"]


class Chat:
    """A conversation that follows a compressed system prompt or document, which is read once and never again.

    Each turn is rendered by the chat template as a stateless server would render the whole conversation, and only what
    the cache has not read is computed: a template that rewrites earlier turns costs time, and changes no answer.

    Parameters
    ----------
    model : PreTrainedModel
        Patched and trained; a peft wrapper around it will do.
    tokenizer : PreTrainedTokenizerBase
        That of the training, with a chat template.
    context : str
        A system prompt, or a document that the first question follows.
    role : str
        ``"system"`` or ``"user"``: whose turn the context stands in.
    cache : GistCache, optional
        The compressed context, if there is one already (a store has it); it stays as it is.

    Attributes
    ----------
    messages : list of dict
        The turns so far, without the context.
    cache : GistCache
        The context's gist rows, and the turns that were read, as its tail.

    Raises
    ------
    ValueError
        As `gistkern.ask`.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> chat = gistkern.Chat(model, tokenizer, "You keep the list of who has which bell.")
    >>> answer = chat.say("Who has it?", max_new_tokens=4)
    >>> [turn["role"] for turn in chat.messages]
    ['user', 'assistant']
    >>> chat.again().messages  # another conversation behind the same compressed prompt
    []
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: str,
        *,
        role: str = "system",
        cache: GistCache | None = None,
    ) -> None:
        handle = handle_of(model)
        check_prefix(handle.training.context_prefix, tokenizer, "the model's training")
        if not isinstance(context, str) or not context.strip():
            raise ValueError("the context is empty: a conversation begins behind one")
        ids = torch.tensor(context_ids(tokenizer, chat_context(tokenizer, context, role)))
        if cache is not None and cache.contexts and ContextRead.of(ids) not in cache.contexts:
            raise ValueError(f"the cache holds another context than this one in a {role}'s turn: leave the cache out")
        self.model, self.tokenizer, self.context, self.role = model, tokenizer, context, role
        self.messages: list[dict[str, str]] = []
        self._fresh = compressed(model, tokenizer, context, role) if cache is None else cache
        self._fresh.without_tail("a conversation begins behind a context alone")
        self.cache = self._fresh.clone()
        self._weights = handle.weights_in_use()
        self._read: list[int] = []  # what the cache has read behind the context

    def __repr__(self) -> str:
        return f"Chat({self.role} context, {len(self.messages)} messages, {self.cache!r})"

    def again(self) -> Chat:
        """A new conversation behind the same compressed context."""
        return Chat(self.model, self.tokenizer, self.context, role=self.role, cache=self._fresh)

    def say(self, text: str, **generate: Any) -> str:
        """Answer a user's turn. Question and answer become part of the conversation.

        Parameters
        ----------
        text : str
            The user's turn.
        **generate
            As of `gistkern.ask`; one answer each time.

        Raises
        ------
        ValueError
            If the text is empty or holds gist tokens, several answers are asked for, the weights have changed since the
            context was compressed, or the chat template refuses the conversation. The conversation is then as it was.

        Examples
        --------
        >>> model, tokenizer, handle = gistkern.load("runs/mine")
        >>> chat = gistkern.Chat(model, tokenizer, "You keep the list of who has which bell.")
        >>> answer = chat.say("Who has it?", max_new_tokens=4)
        >>> answer == chat.messages[-1]["content"]
        True
        """
        if not text.strip():
            raise ValueError("there is nothing to answer: the turn is empty")
        if generate.get("num_return_sequences", 1) != 1:
            raise ValueError("a conversation goes on with one answer: leave num_return_sequences out, or use ask")
        if handle_of(self.model).weights_in_use() != self._weights:
            raise ValueError(
                "the model's weights, or its adapters, are others than when the context was compressed: begin anew"
            )
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.role == "system":
            parts = prompt_parts(self.tokenizer, [{"role": "system", "content": self.context}, *messages])
        else:
            parts = prompt_parts(self.tokenizer, messages, self.context)
        ids = text_ids(self.tokenizer, parts.question)
        cache = self.cache.clone() if self._read else self._fresh.clone()
        known = next((at for at, pair in enumerate(zip(self._read, ids, strict=False)) if pair[0] != pair[1]), None)
        kept = min(len(self._read), len(ids) - 1) if known is None else known
        cache.crop(kept - len(self._read))
        (said,) = answer(self.model, self.tokenizer, [ids], cache, True, generate)
        assert cache.state is not None
        self.cache, self._read = cache, [*ids, *said][: cache.state.fed]
        if cache.batch_size > 1:  # of a beam search, whose rows are of several answers: the turns are read again
            self.cache, self._read = self._fresh.clone(), []
        (reply,) = self.tokenizer.batch_decode([said], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply
