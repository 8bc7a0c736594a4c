"""`generate` of a patched model: what its tokens are beside a compressed context, and what it must not be asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from gistkern.cache import GistCache
from gistkern.versions import CACHE, named

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["generate", "prepare_inputs", "wrapped"]


def wrapped(wrapper: Callable, handle: GistHandle, original: Callable) -> Callable:
    """`wrapper` in place of a model's method, with its signature, by which transformers tells what a model takes."""
    method = partial(wrapper, handle, original)
    signature = inspect.signature(original)
    # without annotations, of which some cannot be pickled, and with them the model
    names = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    method.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    return method


def generate(handle: GistHandle, original, *args, **kwargs):
    """`generate`, refusing what would silently drop tokens of a prompt that follows a compressed context.

    No gist token is ever generated, also where a padded vocabulary has logits for their ids.
    """
    bound = inspect.signature(original).bind_partial(*args, **kwargs).arguments
    arguments = named({**bound.pop("kwargs", {}), **bound})
    _refuse(arguments, arguments.get("generation_config") or handle.model.generation_config)
    ids = [i for i in range(handle.first_id, handle.first_id + handle.num_ids) if i < handle.model.config.vocab_size]
    if ids:
        suppress = SuppressTokensLogitsProcessor(ids, device=handle.model.device)
        arguments["logits_processor"] = LogitsProcessorList([*(arguments.get("logits_processor") or []), suppress])
    return original(**arguments)


def _refuse(arguments: dict[str, Any], config: Any) -> None:
    def setting(name: str) -> Any:
        return arguments[name] if arguments.get(name) is not None else getattr(config, name, None)

    if setting("prefill_chunk_size"):
        raise ValueError(
            "prefill_chunk_size is not supported with gist tokens: compress(..., segment_length=...) reads long "
            "contexts piece by piece"
        )
    cache = arguments.get(CACHE)
    if cache is not None and setting("use_cache") is False:
        raise ValueError(
            "use_cache=False beside a cache would read the question again at every step: leave use_cache out, or the "
            "cache (and pass the context's tokens)"
        )
    if setting("cache_implementation") not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={setting('cache_implementation')!r} is not available: a patched model keeps a "
            "GistCache, which is small because contexts are compressed; leave it out"
        )
    if arguments.get("position_ids") is not None:
        raise ValueError("generate takes no position_ids on a patched model: the position scheme sets them")


def prepare_inputs(handle: GistHandle, original, input_ids, *args, **kwargs):
    """`prepare_inputs_for_generation` that knows which of `generate`'s tokens a GistCache has read.

    The tokens passed to `generate` are those after the compressed context, and the cache's tail has read the
    first of them; transformers would subtract the context's length too.
    """
    kwargs = named(kwargs)
    cache = kwargs.get(CACHE)
    if isinstance(cache, GistCache) and cache.state is not None and kwargs.get("is_first_iteration"):
        embeds = kwargs.get("inputs_embeds")
        given = input_ids if embeds is None else embeds
        _match_batch(cache, len(given))
        read = cache.state.fed
        fresh = given.shape[1] - read
        if fresh <= 0:
            raise ValueError(
                f"generate got {given.shape[1]} tokens, but the cache has read {read} tokens after the compressed "
                "context already: pass those and at least one new token, or a fresh clone of the cache"
            )
        kwargs["next_sequence_length"] = fresh
    inputs = original(input_ids, *args, **kwargs)
    inputs.pop("position_ids", None)  # transformers' guess; the position scheme knows
    return inputs


def _match_batch(cache: GistCache, batch: int) -> None:
    """Repeat the samples of a cache as `generate` repeats its inputs (beams, several answers, one document)."""
    if batch % cache.batch_size:
        raise ValueError(
            f"generate got {batch} rows for a cache of {cache.batch_size} samples: pass one question per sample, "
            "or a cache of one sample for several questions"
        )
    if batch != cache.batch_size:
        cache.batch_repeat_interleave(batch // cache.batch_size)
