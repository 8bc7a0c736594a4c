"""Conversations as a context and what follows it, through the tokenizer's chat template.

A context is one text in front of a conversation: a document at the start of the first user turn (role ``user``), or a
system prompt (role ``system``). The template renders the whole conversation once, with a mark behind the context, and
the rendering is cut there. So whatever the template writes in front (BOS, a date, a default system prompt) belongs to
the context, and whatever it writes behind (the end of the turn, the question) to the question. Training, corpora and
`gistkern.ask` all cut here, so that what is served is what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from gistkern.hf.texts import context_ids, text_ids

__all__ = [
    "ROLES",
    "ChatParts",
    "chat_context",
    "chat_parts",
    "chat_turns",
    "plain_parts",
    "prompt_parts",
    "question_after",
    "stop_ids",
]

ROLES = ("user", "system")
_MARK = "\uf8ffthe context ends here\uf8ff"
_BETWEEN = "\n\n"  # a document and the question about it, in one user turn
_PROBE = "?"
# a template that writes today's date would make two streams of one document: trained on Monday, asked on Tuesday
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_DAY = datetime(2024, 7, 26)  # the day that Llama 3's own template falls back on


class ChatParts(NamedTuple):
    """Texts that are tokenized one by one: a context, the question behind it, and the answer (None where it is asked).

    The question ends where the answer begins (the generation prompt), the answer with the token that ends its turn.
    """

    context: str
    question: str
    answer: str | None = None

    def ids(self, tokenizer: Any) -> dict[str, list[int]]:
        """As a `gistkern.training.GistDataCollator` takes them: `context_ids`, `question_ids`, perhaps `answer_ids`."""
        found = {
            "context_ids": context_ids(tokenizer, self.context),
            "question_ids": text_ids(tokenizer, self.question),
        }
        return found if self.answer is None else found | {"answer_ids": text_ids(tokenizer, self.answer)}


def plain_parts(tokenizer: Any, context: str, question: str, answer: str | None = None) -> ChatParts:
    """Without a chat template: the texts as they stand, and the tokenizer's EOS behind the answer."""
    ended = None if answer is None else answer + (getattr(tokenizer, "eos_token", None) or "")
    return ChatParts(context, question, ended)


def chat_context(tokenizer: Any, context: str, role: str | None = "user") -> str:
    """The rendering of a conversation up to the end of its context: what `gistkern.compress` reads.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        With a chat template.
    context : str
        White space at both ends is dropped, as most templates do.
    role : str
        Whose turn the context begins: ``"user"`` (a document), or ``"system"``. None for a model that was trained on
        texts as they stand (``handle.training.role`` says which): the context itself.

    Raises
    ------
    ValueError
        If there is no template, or it does not leave a context as it is.
    """
    return context if role is None else _cut(tokenizer, _opened(tokenizer, context, _PROBE, role))[0]


def question_after(tokenizer: Any, question: str, role: str | None = "user") -> str:
    """The rendering behind a context that was compressed before, up to where the answer begins; `role` as there."""
    return question if role is None else _prompt(tokenizer, _opened(tokenizer, _PROBE, question, role)).question


def chat_parts(tokenizer: Any, context: str, question: str, answer: str | None = None, role: str = "user") -> ChatParts:
    """A document and a question about it (or a system prompt and what is asked under it) as parts of a conversation.

    Parameters
    ----------
    tokenizer, context, role
        As of `chat_context`.
    question : str
        Follows a document in its user turn, behind an empty line; behind a system prompt it is a user turn.
    answer : str, optional
        The assistant's turn.

    Raises
    ------
    ValueError
        As of `prompt_parts`.

    Examples
    --------
    >>> from gistkern.hf.chat import chat_parts
    >>> class Tokenizer:
    ...     eos_token, added_tokens_decoder = "</s>", {2: "</s>"}
    ...     def get_chat_template(self):
    ...         return ""
    ...     def apply_chat_template(self, messages, add_generation_prompt, **other):
    ...         said = "".join(f"{one['role']}: {one['content']}</s>" for one in messages)
    ...         return said + "assistant: " * add_generation_prompt
    >>> chat_parts(Tokenizer(), "A bell.", "What?", "A bell")
    ChatParts(context='user: A bell.', question='\\n\\nWhat?</s>assistant: ', answer='A bell</s>')
    """
    opened = _opened(tokenizer, context, question, role)
    if answer is None:
        return _prompt(tokenizer, opened)
    return _with_answer(tokenizer, opened, answer.strip())


def prompt_parts(tokenizer: Any, messages: Sequence[Mapping[str, Any]], context: str | None = None) -> ChatParts:
    """A conversation that waits for an answer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        With a chat template.
    messages : sequence of mapping
        Of `role` and `content`, a text. Without a `context` the first message is the context: a system prompt, or a
        user turn that is a document.
    context : str, optional
        A document in front of the first user turn. With a system prompt before it that belongs to the context too.

    Raises
    ------
    ValueError
        If the messages are none, there is no template, it refuses them, or it does not leave the context as it is:
        rewritten, said twice, or behind what comes later.

    Notes
    -----
    For a template without a system turn (Gemma 2) a system prompt stands at the start of the first user turn, as the
    templates of Gemma 3 and Mistral have it. Templates that can think are told not to.
    """
    return _prompt(tokenizer, _placed(tokenizer, _checked(messages), context))


def chat_turns(tokenizer: Any, messages: Sequence[Mapping[str, Any]], context: str | None = None) -> list[ChatParts]:
    """The parts of a conversation for training, one for each assistant turn behind the context.

    Each turn is rendered as it was when it was asked for, because templates write earlier turns otherwise than the
    last one (they take thoughts out): one stream that labels all turns would train on texts that nobody is asked.
    """
    checked = _checked(messages)
    first = 0 if context is not None else 1
    turns = [at for at, message in enumerate(checked) if message["role"] == "assistant" and at >= first]
    if not turns:
        raise ValueError("no assistant turn follows the context: there is nothing to train on")
    return [_with_answer(tokenizer, _placed(tokenizer, checked[:at], context), checked[at]["content"]) for at in turns]


def stop_ids(model: Any, tokenizer: Any, chat: bool) -> list[int]:
    """Ids that end an answer: those of the model's generation config, EOS, and the end of an assistant's turn."""
    known = getattr(model.generation_config, "eos_token_id", None)
    found = [*known] if isinstance(known, list | tuple) else [known]
    found.append(getattr(tokenizer, "eos_token_id", None))
    if chat:
        found += text_ids(tokenizer, chat_parts(tokenizer, "a", _PROBE, "b").answer or "")[-1:]
    return sorted({one for one in found if one is not None})


# ---- the conversation, with a mark behind the context


def _opened(tokenizer: Any, context: str, question: str, role: str) -> list[dict[str, str]]:
    if role not in ROLES:
        raise ValueError(f"a context stands in a turn of one of {list(ROLES)}, got {role!r}")
    asked = [{"role": "user", "content": question.strip()}]
    if role == "user":
        return _placed(tokenizer, asked, context)
    return _placed(tokenizer, [{"role": "system", "content": context.strip()}, *asked], None)


def _placed(tokenizer: Any, messages: list[dict[str, str]], context: str | None) -> list[dict[str, str]]:
    """The messages with the mark behind the context, which stands in one of them."""
    placed = [dict(message) for message in messages]
    if any(_MARK in message["content"] for message in placed) or _MARK in (context or ""):
        raise ValueError("a text holds the mark that contexts are cut at")
    if not placed or (context is not None and not any(message["role"] == "user" for message in placed)):
        raise ValueError("there is no user turn for the context to stand in")
    if context is None:
        placed[0]["content"] = placed[0]["content"].rstrip() + _MARK
    else:
        first = next(message for message in placed if message["role"] == "user")
        first["content"] = context.strip() + _MARK + _BETWEEN + first["content"]
    if placed[0]["role"] == "system" and not _takes_system(tokenizer):
        system, *placed = placed
        if not placed or placed[0]["role"] != "user":
            raise ValueError("the chat template knows no system turn, and no user turn follows that it could stand in")
        placed[0]["content"] = system["content"] + _BETWEEN + placed[0]["content"]
    return placed


def _takes_system(tokenizer: Any) -> bool:
    probe = "a system prompt of some words"
    try:
        said = _rendered(tokenizer, [{"role": "system", "content": probe}, {"role": "user", "content": _PROBE}], True)
    except ValueError:
        return False
    return said.count(probe) == 1


def _checked(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a list of objects with role and content")
    found = []
    for place, message in enumerate(messages):
        where = f"message {place}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must be an object with role and content")
        if unknown := [name for name in message if name not in ("role", "content")]:
            raise ValueError(f"{where} has {unknown}: role and content are read, and texts alone")
        content = message.get("content")
        if isinstance(content, list):  # of typed pieces
            texts: list[Any] = [piece.get("text") if isinstance(piece, Mapping) else piece for piece in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str):
            raise ValueError(f"{where} has no text as its content")
        found.append({"role": message["role"], "content": content})
    return found


# ---- the rendering, cut


def _prompt(tokenizer: Any, placed: list[dict[str, str]]) -> ChatParts:
    context, question = _cut(tokenizer, placed)
    # the same context in the shortest conversation: what is compressed before anybody asks
    marked = next(at for at, message in enumerate(placed) if _MARK in message["content"])
    head, _, rest = placed[marked]["content"].partition(_MARK)
    opening = [*placed[:marked], {**placed[marked], "content": head + _MARK + (_BETWEEN + _PROBE if rest else "")}]
    if placed[marked]["role"] == "system":
        opening.append({"role": "user", "content": _PROBE})
    if _cut(tokenizer, opening)[0] != context:
        raise ValueError(
            "the chat template writes something in front of the context that depends on what follows it (Mistral's "
            "first ones put the system prompt into the last user turn): it could not be compressed before the "
            "question is known. Write rows of context, question and answer, and train with --no-chat"
        )
    return ChatParts(context, question)


def _with_answer(tokenizer: Any, placed: list[dict[str, str]], answer: str) -> ChatParts:
    if not answer.strip():
        raise ValueError("an assistant turn is empty")
    prompt = _prompt(tokenizer, placed)
    whole = _rendered(tokenizer, [*_unmarked(placed), {"role": "assistant", "content": answer}], False)
    asked = prompt.context + prompt.question
    said = whole[len(asked) :]
    before, found, behind = said.partition(answer.strip())
    if not whole.startswith(asked) or not found:
        raise ValueError(
            "the chat template writes a turn that is answered otherwise than one that is asked (it takes thoughts out "
            "of answers, or moves the system prompt): take thoughts out of the data, or write rows of context, "
            "question and answer, and train with --no-chat"
        )
    return prompt._replace(answer=before + found + _end_of_turn(tokenizer, behind))


def _end_of_turn(tokenizer: Any, behind: str) -> str:
    """What stands behind an answer, to its first special token: a model stops there. Without any it is EOS."""
    tokens = map(str, getattr(tokenizer, "added_tokens_decoder", {}).values())
    places = [(behind.find(token), token) for token in tokens if token and token in behind]
    if not places:
        return getattr(tokenizer, "eos_token", None) or ""
    place, token = min(places, key=lambda one: (one[0], -len(one[1])))
    return behind[:place] + token


def _cut(tokenizer: Any, placed: list[dict[str, str]]) -> tuple[str, str]:
    """The rendering with its generation prompt, up to the mark and behind it."""
    said = _rendered(tokenizer, placed, True)
    context, *rest = said.split(_MARK)
    if len(rest) != 1 or context + rest[0] != _rendered(tokenizer, _unmarked(placed), True):
        raise ValueError(
            "the chat template does not leave the context as it is (it says it "
            f"{'twice' if len(rest) > 1 else 'not at all' if not rest else 'otherwise'}): write rows of context, "
            "question and answer, and train with --no-chat"
        )
    return context, rest[0]


def _unmarked(placed: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**message, "content": message["content"].replace(_MARK, "")} for message in placed]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], ask: bool) -> str:
    try:
        template = tokenizer.get_chat_template()
    except (AttributeError, ValueError) as error:
        raise ValueError("the tokenizer has no chat template: leave chat out (gistkern train: --no-chat)") from error
    template = _NOW.sub(lambda found: repr(_DAY.strftime(found[2])), template)
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=ask, enable_thinking=False
        )
    except Exception as error:  # of many kinds: jinja's, and what a template raises by itself
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
