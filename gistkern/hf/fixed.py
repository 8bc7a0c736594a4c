"""A patched model's call over a cache of fixed size: the same steps for every token, which `torch.compile` traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gistkern.cache.fingerprint import check_cache, check_scheme
from gistkern.cache.fixed import FixedGistCache
from gistkern.cache.versions import CACHE
from gistkern.hf.caching import check_history
from gistkern.layout.arguments import check_padding

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle
    from gistkern.layout import GistLayout

__all__ = ["fixed_call", "fixed_step"]


def fixed_call(
    handle: GistHandle,
    arguments: dict[str, Any],
    ids: torch.Tensor | None,
    embeds: torch.Tensor,
    is_gist: torch.Tensor,
    layout: GistLayout | None,
) -> dict[str, Any]:
    """The inner model's arguments. Where nothing is compiled, what they hold is looked at first.

    Raises
    ------
    ValueError
        For what a cache of fixed size does not serve, another batch or model, or a call that it has no room for.
    """
    cache: FixedGistCache = arguments[CACHE]
    _check_form(cache, arguments, is_gist, layout)
    mask, rows = arguments.get("attention_mask"), is_gist.shape[1]
    if torch.compiler.is_compiling():
        if not cache.is_known_to(handle):
            raise ValueError("this model has not read the cache yet: call it once without compiling, as generate does")
        valid = None if mask is None else mask[:, -rows:] != 0
    else:
        handle.check_settings()
        _check_reader(cache, handle)
        valid = _check_values(cache, mask, is_gist)
    call = cache.begin(ids, valid, rows, handle.windows, handle.backend)
    return arguments | {
        "inputs_embeds": embeds,
        "position_ids": call.position_ids,
        "attention_mask": None,
        "use_cache": True,
        "gist_call": call,
    }


def fixed_step(handle: GistHandle, arguments: dict[str, Any], ids: torch.Tensor) -> dict[str, Any] | None:
    """The inner model's arguments of a step of `generate` that the cache was told of, None of any other call.

    The call before it, of the same `generate`, was checked; this one brings a raw token for each sample, with room.
    """
    cache: FixedGistCache = arguments[CACHE]
    if torch.compiler.is_compiling() or not cache.is_announced(ids):
        return None
    call = cache.begin(ids, None, 1, handle.windows, handle.backend, counted=True)
    arguments["input_ids"], arguments["inputs_embeds"] = None, handle.embed_words(ids)
    arguments["position_ids"], arguments["use_cache"], arguments["gist_call"] = call.position_ids, True, call
    return arguments


def _check_form(
    cache: FixedGistCache, arguments: dict[str, Any], is_gist: torch.Tensor, layout: GistLayout | None
) -> None:
    for name, given in (("gist_layout", layout), *((n, arguments.get(n)) for n in ("position_ids", "cu_seq_lens_q"))):
        if given is not None:
            raise ValueError(f"{name} does not go with a cache of fixed size, which counts by itself: leave it out")
    if cache.batch_size != len(is_gist):
        raise ValueError(f"the cache holds {cache.batch_size} samples, the call has {len(is_gist)}")
    mask, (batch, rows) = arguments.get("attention_mask"), is_gist.shape
    if mask is None:
        return
    if not torch.is_tensor(mask) or mask.dim() != 2 or len(mask) != batch or mask.shape[1] < rows:
        found = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, tokens] with at least the {rows} new tokens of {batch} samples, "
            f"got {found}"
        )


def _check_reader(cache: FixedGistCache, handle: GistHandle) -> None:
    check_scheme(cache, handle)
    if not cache.knows(handle):
        check_cache(cache, handle.model)
        cache.accept(handle)


def _check_values(cache: FixedGistCache, mask: torch.Tensor | None, is_gist: torch.Tensor) -> torch.Tensor | None:
    """bool ``[B, N]`` of the tokens that are no padding, None where all are; there is room for them.

    A step of one token asks the device nothing, so that a CUDA graph can capture it: a gist token in it is read as any
    other, and gives no gist row.
    """
    rows = is_gist.shape[1]
    if rows > 1 and bool(is_gist.any()):
        raise ValueError(
            "a cache of fixed size takes no gist tokens after its context: pass the cache that fixed() was called on"
        )
    if mask is None:
        cache.require(rows)
        return None
    check_history(cache, mask[:, : mask.shape[1] - rows])
    valid = check_padding(is_gist, mask[:, -rows:])
    if bool(valid.all()):
        cache.require(rows)
        return None
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise ValueError("a cache of fixed size takes padding in front of a call's tokens, not behind or between them")
    cache.require(rows, valid)
    return valid
