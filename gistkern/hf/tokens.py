"""The gist tokens of a tokenizer."""

from __future__ import annotations

from typing import Any

__all__ = ["add_gist_tokens", "check_tokenizer"]


def check_tokenizer(tokenizer: Any) -> None:
    """Raise TypeError unless it is None or can be given special tokens."""
    if tokenizer is None or all(hasattr(tokenizer, name) for name in ("add_special_tokens", "convert_tokens_to_ids")):
        return
    hint = f": for {tokenizer} gist tokens write num_gist_tokens={tokenizer}" if isinstance(tokenizer, int) else ""
    raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}{hint}")


def add_gist_tokens(tokenizer: Any, count: int, expected: int | None) -> int:
    """Id of the first of `count` gist tokens, which follow each other; the tokenizer gets those it does not have.

    Raises
    ------
    ValueError
        If the ids do not follow each other or do not begin at `expected`; where that can be foreseen, the tokenizer
        is left as it was.
    """
    tokens = [f"<gist_{i}>" for i in range(count)]
    if hasattr(tokenizer, "get_added_vocab"):
        known = tokenizer.get_added_vocab()
        new = iter(range(len(tokenizer), len(tokenizer) + count))
        _check([known[token] if token in known else next(new) for token in tokens], expected)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    ids: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    _check(ids, expected)
    return ids[0]


def _check(ids: list[int], expected: int | None) -> None:
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(
            f"the tokenizer gives the gist tokens ids that do not follow each other: {ids}. Patch with as many as it "
            "knows, or pass a tokenizer without them"
        )
    if expected is not None and ids[0] != expected:
        raise ValueError(
            f"the tokenizer's gist tokens begin at id {ids[0]}, the checkpoint's at {expected}: "
            "pass the tokenizer that the model was trained with"
        )
