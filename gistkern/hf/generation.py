"""`generate` of a patched model: what its tokens are beside a compressed context, and what it must not be asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from gistkern.cache.cache import GistCache
from gistkern.cache.fixed import FixedGistCache
from gistkern.cache.offload import input_device
from gistkern.cache.reader import ATTRIBUTE
from gistkern.cache.tokens_read import PADDING
from gistkern.cache.versions import CACHE, named

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["generate", "prepare_inputs", "wrapped"]


class _NeverGists(SuppressTokensLogitsProcessor):
    """A class of its own: transformers would let one of a type that it has made itself take the place of that one."""


@dataclass
class _Run:
    """A `generate` under way, of which the host knows what its steps bring.

    Parameters
    ----------
    handle : GistHandle
        Of the model that generates.
    raw : bool
        Whether what it appends can be no gist token, as a step need then not ask the device.
    cache : Any
        Of its first call, which was checked.
    steps : int
        That were announced to the cache so.
    """

    handle: GistHandle
    raw: bool
    cache: Any = None
    steps: int = 0


_RUN: ContextVar[_Run | None] = ContextVar("generate under way", default=None)


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
    _refuse(handle, arguments, arguments.get("generation_config") or handle.model.generation_config)
    if arguments.get("position_ids") is not None:
        _check_positions(arguments)
    ids = [i for i in range(handle.first_id, handle.first_id + handle.num_ids) if i < handle.model.config.vocab_size]
    if ids:
        suppress = _NeverGists(ids, device=str(input_device(handle.model)))
        arguments["logits_processor"] = LogitsProcessorList([*(arguments.get("logits_processor") or []), suppress])
    run = _Run(handle, _appends_raw_tokens(handle, arguments, ids))
    token = _RUN.set(run)
    try:
        output = original(**arguments)
    finally:
        _RUN.reset(token)
    if run.steps:
        _check_appended(handle, arguments, output)
    return output


def _appends_raw_tokens(handle: GistHandle, arguments: dict[str, Any], suppressed: list[int]) -> bool:
    """Whether `generate` can append no gist token: none that it samples, and none that fills a finished answer up."""
    if arguments.get("custom_generate") is not None:
        return False
    given, configs = arguments.get("generation_config"), [handle.model.generation_config]
    configs += [] if given is None else [given]

    def values(name: str) -> list[Any]:
        found = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
        return [each for value in found for each in (value if isinstance(value, (list, tuple)) else [value])]

    # of too few tokens beams take suppressed ones too
    if suppressed and any(beams not in (None, 1) for beams in values("num_beams")):
        return False
    last = handle.first_id + handle.num_ids
    special = [value for name in ("pad_token_id", "eos_token_id") for value in values(name)]
    return not any(isinstance(value, int) and handle.first_id <= value < last for value in special) and not any(
        torch.is_tensor(value) for value in special
    )


def _check_appended(handle: GistHandle, arguments: dict[str, Any], output: Any) -> None:
    """RuntimeError if there is a gist token among those that steps took for raw ones (somebody put it there)."""
    sequences = output if torch.is_tensor(output) else output.sequences
    given = [arguments[name] for name in ("inputs", "input_ids") if torch.is_tensor(arguments.get(name))]
    appended = sequences[:, given[0].shape[1] if given else 0 :]
    if bool(handle.is_gist(appended).any()):
        raise RuntimeError(
            "generate has appended a gist token, which its steps have read as a word: no logits processor or stopping "
            "criterion may put one in"
        )


# options that look the prompt's ids up in the logits, and the values that switch them off
_LOOK_UP = {
    "prompt_lookup_num_tokens": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
}


def _refuse(handle: GistHandle, arguments: dict[str, Any], config: Any) -> None:
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
    # the second is what assisted decoding asks of a draft model in transformers 5.6
    if setting("cache_implementation") not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation={setting('cache_implementation')!r} is not available: a patched model keeps a "
            "GistCache, which is small because contexts are compressed: leave it out, or pass one of fixed size, "
            "cache.fixed(room=...)"
        )
    draft, prompt = arguments.get("assistant_model"), arguments.get("inputs", arguments.get("input_ids"))
    strange = draft is not None and not hasattr(draft, ATTRIBUTE)
    beyond = handle.first_id + handle.num_ids > handle.model.config.vocab_size
    looks_up = [name for name, off in _LOOK_UP.items() if beyond and setting(name) not in off]
    if (strange or looks_up) and torch.is_tensor(prompt) and bool(handle.is_gist(prompt).any()):
        if strange:
            raise ValueError("the prompt holds gist tokens, which assistant_model does not know: patch that model too")
        raise ValueError(
            f"{looks_up[0]} looks the prompt's tokens up in the logits, which has none for the gist tokens in it: "
            "compress the context and pass the cache, or leave the option out"
        )


def _check_positions(arguments: dict[str, Any]) -> None:
    """Take `position_ids` out; ValueError unless they count tokens one by one, as the scheme does anyway.

    From anywhere, or where a cache begins or ends: transformers passes a draft model those of the large one.
    """
    positions, mask, cache = arguments.pop("position_ids"), arguments.get("attention_mask"), arguments.get(CACHE)
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask.to(positions.device) != 0
    if positions.dim() == 2 and real.dim() == 2 and positions.shape[1] == real.shape[1]:
        counted = ((positions.diff(dim=1) == 1) | ~(real[:, 1:] & real[:, :-1])).all()
        if isinstance(cache, GistCache) and cache.state is not None:
            state = cache.state
            first = positions.expand(real.shape).gather(1, real.int().argmax(1, keepdim=True)).to(state.seen.device)
            starts = (0, state.length - state.fed, state.length, state.seen[:, None] - state.fed, state.seen[:, None])
            counted = counted & torch.stack([(first == start).all() for start in starts]).any().to(counted.device)
        if bool(counted):
            return
    raise ValueError(
        "generate takes no position_ids on a patched model but those that count tokens one by one, which the position "
        "scheme sets: leave them out"
    )


def prepare_inputs(handle: GistHandle, original, input_ids, *args, **kwargs):
    """`prepare_inputs_for_generation` that knows which of `generate`'s tokens a GistCache has read.

    The tokens passed to `generate` are those after the compressed context, and the cache's tail has read the
    first of them; transformers would subtract the context's length too.
    """
    cache, first = kwargs.get(CACHE), kwargs.get("is_first_iteration")
    if not first and (type(cache) is FixedGistCache or (type(cache) is GistCache and cache.state is not None)):
        return _next_inputs(handle, original, input_ids, args, kwargs)
    kwargs = named(kwargs)
    cache, run = kwargs.get(CACHE), _RUN.get()
    if run is not None and run.handle is handle:
        run.cache = cache
    goes_on = isinstance(cache, FixedGistCache) or (isinstance(cache, GistCache) and cache.state is not None)
    if isinstance(cache, (GistCache, FixedGistCache)) and goes_on and first:
        kwargs["next_sequence_length"] = _fresh_tokens(cache, input_ids, kwargs)
    if isinstance(cache, FixedGistCache):
        mask = kwargs.pop("attention_mask", None)
        _count(cache, input_ids, kwargs)
        inputs = _without_masks(cache, original, input_ids, args, kwargs)
        if mask is not None:
            inputs["attention_mask"] = mask
    else:
        inputs = original(input_ids, *args, **kwargs)
    inputs.pop("position_ids", None)  # transformers' guess; the position scheme knows
    if goes_on and not first:
        inputs.pop("attention_mask", None)  # what generate() appends is real: nothing to read back from the device
    return inputs


def _next_inputs(handle: GistHandle, original, input_ids, args: tuple[Any, ...], kwargs: dict[str, Any]):
    """What follows the first call over compressed rows: the position scheme knows the places of real tokens."""
    cache, run = kwargs[CACHE], _RUN.get()
    kwargs.pop("attention_mask", None)  # what generate() appends is real: nothing to read back from the device
    kwargs.pop("position_ids", None)
    has_room = True
    if type(cache) is FixedGistCache:
        has_room = _count(cache, input_ids, kwargs)
        inputs = _without_masks(cache, original, input_ids, args, kwargs)
    else:
        inputs = original(input_ids, *args, **kwargs)
    if "position_ids" in inputs:
        del inputs["position_ids"]
    if run is None or run.handle is not handle:
        return inputs
    if run.cache is not cache:
        run.cache = cache
    elif run.raw and has_room and inputs["input_ids"] is not None and inputs["input_ids"].shape[1] == 1:
        (cache if type(cache) is FixedGistCache else cache.steps).announce(inputs["input_ids"])
        run.steps += 1
    return inputs


def _without_masks(
    cache: FixedGistCache, original, input_ids: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """transformers' inputs for a cache of fixed size, without the mask of all its room that it would make each time."""
    cache.is_compileable = False
    try:
        return original(input_ids, *args, **kwargs)
    finally:
        del cache.is_compileable


def _count(cache: FixedGistCache, input_ids: torch.Tensor, arguments: dict[str, Any]) -> bool:
    """Tell a cache of fixed size what the call that follows brings; ValueError where it has no room for it.

    False where only the call itself can see what that is.
    """
    fresh = arguments.get("next_sequence_length")
    if arguments.get("is_first_iteration") or fresh is None:
        cache.counts(None)
        return False  # the call itself looks at its padding
    cache.counts(input_ids.shape[1] - fresh)
    cache.require(fresh)
    return True


def _fresh_tokens(cache: GistCache | FixedGistCache, input_ids: torch.Tensor, arguments: dict[str, Any]) -> int:
    """How many of the tokens that `generate` was given the cache has not read.

    Raises
    ------
    ValueError
        If there is none, if the first are not those that the cache has read, or if they repeat the context.
    """
    embeds = arguments.get("inputs_embeds")
    given = input_ids if embeds is None else embeds
    _match_batch(cache, len(given))
    assert cache.state is not None
    read = cache.state.fed
    if given.shape[1] <= read:
        raise ValueError(
            f"generate got {given.shape[1]} tokens, but the cache has read {read} tokens after the compressed "
            "context already: pass those and at least one new token, or a fresh clone of the cache"
        )
    if embeds is not None:
        return given.shape[1] - read
    mask = arguments.get("attention_mask")
    real = torch.ones_like(input_ids, dtype=torch.bool)
    if torch.is_tensor(mask) and mask.dim() == 2 and mask.shape[1] >= input_ids.shape[1]:
        real = mask[:, -input_ids.shape[1] :].to(input_ids.device) != 0
    if (found := cache.read.different(input_ids.masked_fill(~real, PADDING))) is not None:
        sample, column, about_padding = found
        raise ValueError(
            f"token {column} of sample {sample} is not the one that the cache has read there"
            + (" (one of them is padding)" if about_padding else "")
            + f": generate takes the {read} tokens after the compressed context that the cache has read, and new ones "
            "behind them. For another question pass a fresh clone of the compressed cache; to change an "
            "earlier turn crop the cache to where it changes"
        )
    if not read and cache.contexts:
        _refuse_context(cache, input_ids, real)
    return input_ids.shape[1] - read


def _refuse_context(cache: GistCache | FixedGistCache, input_ids: torch.Tensor, real: torch.Tensor) -> None:
    shortest = min(context.covered for context in cache.contexts)
    if input_ids.shape[1] < shortest:
        return
    for sample, (ids, mask) in enumerate(zip(input_ids.cpu(), real.cpu(), strict=True)):
        if any(context.begins(ids[mask]) for context in cache.contexts):
            raise ValueError(
                f"sample {sample} begins with the context that the cache holds, which would be read again, raw: pass "
                "generate the tokens after the context alone"
            )


def _match_batch(cache: GistCache | FixedGistCache, batch: int) -> None:
    """Repeat the samples of a cache as `generate` repeats its inputs (beams, several answers, one document)."""
    if batch % cache.batch_size:
        raise ValueError(
            f"generate got {batch} rows for a cache of {cache.batch_size} samples: pass one question per sample, "
            "or a cache of one sample for several questions"
        )
    if batch != cache.batch_size:
        cache.batch_repeat_interleave(batch // cache.batch_size)
