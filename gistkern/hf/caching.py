"""Which cache a call of a patched model reads and fills, and whether it is this model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from gistkern.cache.cache import GistCache
from gistkern.cache.fingerprint import check_cache, check_scheme
from gistkern.cache.fixed import FixedGistCache
from gistkern.cache.tokens_read import PADDING, UNKNOWN
from gistkern.cache.versions import CACHE

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["Carried", "cache_of", "check_history"]


class Carried:
    """A cache on its way through a model whose weights accelerate moves.

    accelerate moves every argument that has a `to`, and a copy would be filled in place of the caller's cache.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache


def cache_of(
    handle: GistHandle, module: nn.Module, arguments: dict[str, Any], shape: torch.Size, packed: bool
) -> GistCache | None:
    """The `GistCache` of a call of ``(batch, tokens)``, or None.

    Raises
    ------
    ValueError, TypeError
        For a cache of another kind, batch, model or position scheme, or where none can be filled.
    """
    given: Cache | None = arguments.get(CACHE)
    use_cache = arguments.get("use_cache")
    wanted = given is not None or use_cache
    if packed and wanted:
        raise ValueError(
            "position_ids (or cu_seq_lens_q) pack several documents into a row, which no cache can tell apart: "
            "pass use_cache=False and no cache, or one document per sample"
        )
    if wanted and _checkpoints_activations(module):
        raise ValueError("a cache cannot be filled under gradient checkpointing: pass use_cache=False")
    if given is None:
        # transformers would cache by default even in training, where nothing reads it
        if use_cache is None:
            wanted = handle.inner.config.use_cache and not module.training and not packed
        if not wanted:
            return None
        given = GistCache()
    cache = _as_gist_cache(given)
    batch, tokens = shape
    if cache.state is not None and cache.batch_size != batch:
        raise ValueError(f"the cache holds {cache.batch_size} samples, the call has {batch}")
    check_scheme(cache, handle)
    cache.positions = handle.positions
    if cache.state is None:
        cache.written_by(handle)
    elif not cache.knows(handle, tokens):
        check_cache(cache, handle.model)
        cache.accept(handle)
    return cache


def _as_gist_cache(cache: Cache) -> GistCache:
    if isinstance(cache, GistCache):
        return cache
    if type(cache) is DynamicCache and cache.get_seq_length() == 0 and not getattr(cache, "offloading", False):
        return GistCache.in_place_of(cache)  # generate() makes one before it knows the model
    filled = type(cache) is DynamicCache and cache.get_seq_length() > 0
    raise TypeError(
        f"a patched model reads a GistCache, got a {type(cache).__name__}"
        + (" with tokens in it" if filled else "")
        + (" that offloads" if getattr(cache, "offloading", False) else "")
        + f": pass {CACHE}=gistkern.compress(...), gistkern.GistCache() or none"
    )


def _checkpoints_activations(module: nn.Module) -> bool:
    return module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def check_history(cache: GistCache | FixedGistCache | None, history: torch.Tensor) -> None:
    """Raise ValueError if the part of an attention mask that stands before the call's own tokens hides what was read.

    `history` is ``[B, columns]``, 0 where hidden. Whoever shows all of it may mean the context, its rows or the tail;
    whoever hides some must hide what was padding when the cache read it.
    """
    if not history.shape[1]:
        return
    shown = history != 0
    if cache is None or cache.state is None:
        if bool(shown.any()):
            raise ValueError(
                f"attention_mask shows {history.shape[1]} tokens before those of this call, but there is no cache that "
                f"has read them: pass {CACHE}, or a mask of the call's own tokens"
            )
        return
    if bool(shown.all()):
        return
    state, read = cache.state, cache.read.ids()
    if read is not None and read.shape[1] == history.shape[1]:
        agrees = (shown.to(read.device) == (read != PADDING)) | (read == UNKNOWN)
        if bool(agrees.all()):
            return
    count = shown.sum(1).to(state.seen.device)
    # the tail alone, all that was read (gists included), or the context's own tokens and the tail
    contexts = torch.tensor([context.tokens for context in cache.contexts] or [-1], device=count.device)
    of_context = torch.isin(count - state.tail_rows, contexts).all()
    known = torch.stack([(count == state.tail_rows).all(), (count == state.seen).all(), of_context])
    if history.shape[1] == state.fed and read is not None and not bool((read == UNKNOWN).any()):
        known = known[:0]  # column by column it was seen to differ
    if not bool(known.any()):
        raise ValueError(
            "attention_mask hides tokens that the cache has read as real ones (samples that generate() had ended "
            "early, say), or shows its padding: crop the cache, or continue the samples one by one"
        )
