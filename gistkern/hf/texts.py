"""How a text becomes token ids: one rule for training, for corpora and for what is asked later.

A context begins as the tokenizer begins a document: with the special tokens it puts in front (BOS, or whatever its
post-processor adds), once. It never ends with special tokens (EOS, SEP), because gist tokens and a question follow. All
that follows a context has no special tokens but those its text spells out.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

__all__ = ["check_prefix", "context_ids", "context_prefix", "text_ids"]

# words that most vocabularies know; the first of a tokenizer's own come after them
_PROBES = ("a", "0", ".", "A", "?", "the")
_OWN_PROBES = 64


def context_prefix(tokenizer: Any) -> list[int] | None:
    """Ids that `tokenizer` puts in front of a document, now: what a model or a corpus records.

    They are seen by tokenising a word with and without special tokens, so slow and fast tokenizers are alike, and a
    change of ``add_bos_token`` after loading counts.

    Returns
    -------
    list of int or None
        None where they cannot be seen: for a callable without ``add_special_tokens``. Its ids are taken as they are.
    """
    if not _knows_special_tokens(tokenizer):
        return None
    for probe in _probes(tokenizer):
        bare, whole = _encode(tokenizer, probe, special=False), _encode(tokenizer, probe, special=True)
        width = len(bare)
        places = [place for place in range(len(whole) - width + 1) if whole[place : place + width] == bare]
        if width and len(places) == 1:  # more: the word's tokens are the special tokens too
            return whole[: places[0]]
    return None


def context_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a context: what its text says, behind the tokens that begin a document.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase or callable
        A callable that does not take ``add_special_tokens`` is believed: what it returns is the context.
    text : str
        One that begins with the prefix already (a chat template writes ``<s>``) does not get it twice.

    Raises
    ------
    ValueError
        If `text` is no string that UTF-8 can write, or the tokenizer returns no list of ids.

    Examples
    --------
    >>> from gistkern.hf.texts import context_ids
    >>> context_ids(lambda text: [ord(letter) for letter in text], "abc")
    [97, 98, 99]
    """
    prefix = context_prefix(tokenizer)
    if prefix is None:
        return _encode(tokenizer, text, special=None)
    ids = _encode(tokenizer, text, special=False)
    if not ids:
        return []  # an empty text is no document, whatever begins it
    known = next((place for place, pair in enumerate(zip(prefix, ids, strict=False)) if pair[0] != pair[1]), None)
    return prefix + ids[min(len(prefix), len(ids)) if known is None else known :]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a question, an answer or anything else that follows a context: no special tokens are added."""
    return _encode(tokenizer, text, special=False if _knows_special_tokens(tokenizer) else None)


def check_prefix(recorded: Sequence[int] | None, tokenizer: Any, where: str) -> None:
    """Raise ValueError unless `tokenizer` begins contexts as was `recorded` (`context_prefix`) by `where`.

    None, recorded or found, says that nobody knows: it agrees with everything.
    """
    if recorded is None:
        return
    found = context_prefix(tokenizer)
    if found is not None and list(recorded) != found:
        raise ValueError(
            f"contexts of {where} begin with {_spelled(tokenizer, recorded)}, this tokenizer begins them with "
            f"{_spelled(tokenizer, found)}: pass the tokenizer that was used there (its add_bos_token as it was)"
        )


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    if not ids:
        return "no special token"
    try:
        return f"{list(ids)} ({tokenizer.decode(list(ids))!r})"
    except Exception:  # of whatever kind a foreign tokenizer raises: the ids alone say enough
        return str(list(ids))


def _probes(tokenizer: Any) -> Iterator[str]:
    yield from _PROBES
    if hasattr(tokenizer, "get_vocab"):
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        yield from (word for word in itertools.islice(tokenizer.get_vocab(), _OWN_PROBES) if word not in special)


def _knows_special_tokens(tokenizer: Any) -> bool:
    call = tokenizer if callable(tokenizer) else getattr(tokenizer, "encode", None)
    if call is None:
        raise ValueError(f"a tokenizer is called with a text and returns ids; {type(tokenizer).__name__} cannot be")
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # of some compiled callables
        return call is not tokenizer  # tokenizers.Tokenizer.encode
    return any(one.name == "add_special_tokens" or one.kind is one.VAR_KEYWORD for one in parameters)


def _encode(tokenizer: Any, text: str, special: bool | None) -> list[int]:
    """The tokenizer's ids with or without special tokens, or as it likes (None)."""
    if not isinstance(text, str):
        raise ValueError(f"a text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is half a surrogate pair ({text[error.start]!r}), which no tokenizer "
            "reads: decode it with errors='replace', or take it out"
        ) from error
    options = {} if special is None else {"add_special_tokens": special}
    found: Any = tokenizer(text, **options) if callable(tokenizer) else tokenizer.encode(text, **options)
    if isinstance(found, Mapping):
        found = found.get("input_ids")
    found = getattr(found, "ids", found)  # of tokenizers.Encoding
    found = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(found, list | tuple) or any(
        isinstance(one, bool) or not isinstance(one, Integral) for one in found
    ):
        raise ValueError(
            f"the tokenizer returned {type(found).__name__} where a list of ids was expected: pass one that returns a "
            "text's ids, or a dict with them as input_ids"
        )
    return [int(one) for one in found]
