"""What happens around every call of a patched model: embeddings, layout, positions, cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from gistkern.cache.cache import GistCache
from gistkern.cache.fixed import FixedGistCache
from gistkern.cache.host_plan import Call
from gistkern.cache.plan import CacheState, CallPlan, plan_call, plan_layout
from gistkern.cache.versions import CACHE, named
from gistkern.cache.windows import Windows, check_window
from gistkern.distributed.collectives import check_same, whole_loss
from gistkern.hf.caching import Carried, cache_of, check_history
from gistkern.hf.context_parallel import (
    Parallel,
    kept_columns,
    own_columns,
    shard_of,
    split_labels,
    whole_logits,
)
from gistkern.hf.documents import broadcast_positions, check_positions, packed_documents
from gistkern.hf.fixed import fixed_call, fixed_step
from gistkern.hf.labels import ignore_gists
from gistkern.layout import GistLayout
from gistkern.layout.arguments import check_padding
from gistkern.ops.attention import AttentionOptions, attend

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["GistCall", "after_inner", "after_model", "before_inner", "before_model"]


_CARRIED = "gist_cache"
_NAMES: dict[type, list[str]] = {}  # what `_positional` has found


@dataclass
class GistCall:
    """What the attention function needs to know of the call, handed down through the layers."""

    layout: GistLayout
    backend: str
    windows: Windows
    others: GistCache | Parallel | None = None  # who knows the rows that are not the call's own
    made: dict[tuple[torch.device, int | None], GistLayout] = field(default_factory=dict)
    options: AttentionOptions | None = None  # of the layer before, and mostly of all

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        window: int | None,
        learned_sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Output ``[B, Hq, N, D]`` of one layer, of the call's own rows of queries, keys and values."""
        # every line is run by every layer of every decode step: nothing is called that an attribute answers
        if window != self.windows[layer]:
            check_window(layer, self.windows[layer], window)
        if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(v.device.type):
            q, k = q.to(v.dtype), k.to(v.dtype)  # which the rotation has promoted to fp32
        layout, options = self.layout, self.options
        if window is not None or q.device != layout.gist_begin.device:
            layout = self._layout_of(q.device, window)
        if options is None or scale != options.scale or learned_sinks is not options.learned_sinks:
            options = self.options = AttentionOptions(scale, self.backend, learned_sinks)
        if self.others is not None:
            return self.others.attend(layer, q, k, v, layout, options)
        return attend(q, k, v, layout, options, wants_rows=False)[0]

    def _layout_of(self, device: torch.device, window: int | None) -> GistLayout:
        """The layout of layers with a window (None: without one) on a device; accelerate may have put them on several.

        Made once for all layers that are alike.
        """
        if window is None and device == self.layout.device:
            return self.layout
        if (device, window) not in self.made:
            whole = self.layout.to(device) if window is None else self._layout_of(device, None).windowed(window)
            self.made[device, window] = whole
        return self.made[device, window]


def before_model(handle: GistHandle, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Labels that leave gist tokens out; under context parallelism the arguments of this rank's shard."""
    arguments = _bind(module, args, kwargs)
    if "labels" in arguments or "shift_labels" in arguments:
        ignore_gists(handle, arguments)
    if "_hf_hook" in module.__dict__ and arguments.get(CACHE) is not None:
        arguments[_CARRIED] = Carried(arguments.pop(CACHE))
    if handle.context_parallel is not None:
        if not arguments.get("return_dict", handle.model.config.return_dict):
            raise ValueError("a model patched with context_parallel gives no tuples: leave return_dict=False out")
        arguments = _parallel(handle, arguments)
        parallel = arguments["gist_parallel"]
        split_labels(arguments, parallel.shard)
        if parallel.kept is not None:
            arguments["logits_to_keep"] = own_columns(parallel)
    return (), arguments


def after_model(handle: GistHandle, module: nn.Module, args: tuple, kwargs: dict[str, Any], output):
    """The caller's own cache; under context parallelism the whole context's loss, and the kept logits of every rank."""
    if _CARRIED in kwargs and isinstance(output, ModelOutput):
        output[CACHE] = kwargs[_CARRIED].cache
    if handle.context_parallel is None:
        return
    if output.loss is not None:
        output.loss = whole_loss(output.loss, handle.context_parallel)
    if kwargs["gist_parallel"].kept is not None:
        output.logits = whole_logits(output.logits, kwargs["gist_parallel"])


def before_inner(handle: GistHandle, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Replace ids by embeddings, and add layout, positions and cache to the inner model's arguments."""
    if (planned := kwargs.get("gist_plan")) is not None and handle.context_parallel is None:
        return (), _planned_call(handle, kwargs, planned)
    arguments = _bind(module, args, kwargs)
    if _CARRIED in arguments:
        arguments[CACHE] = arguments.pop(_CARRIED).cache
    if handle.context_parallel is not None:
        if "gist_parallel" not in arguments:  # the inner model was called by itself
            arguments = _parallel(handle, arguments)
        return (), _shard_call(handle, arguments)
    if (step := _step(handle, arguments)) is not None:
        return (), step
    ids, embeds, layout = _inputs(handle.inner.config, arguments)
    is_gist = _is_gist(handle, ids, embeds, layout)
    if isinstance(arguments.get(CACHE), FixedGistCache):
        embeds = embeds if ids is None else embed(handle, ids, is_gist)
        assert embeds is not None
        return (), fixed_call(handle, arguments, ids, embeds, is_gist, layout)
    # the one question to the device, unless the caller has laid the call out
    has_gists = layout is not None or bool(is_gist.any())
    if ids is not None:
        # where gist rows may learn they are part of every call, as wrappers of models ask (DDP, FSDP)
        embeds = embed(handle, ids, is_gist) if has_gists or torch.is_grad_enabled() else handle.embed_words(ids)
    handle.check_settings()
    documents = packed_documents(arguments, is_gist.shape, is_gist.device) if layout is None else None
    cache = cache_of(handle, module, arguments, is_gist.shape, documents is not None)
    plan = _plan(handle, arguments, layout, is_gist, has_gists, cache, documents)
    if cache is not None:
        cache.begin(plan, ids)
    # with a mask present transformers does not guess packed documents from the positions
    arguments["attention_mask"] = plan.layout.is_real()
    return (), _with_call(handle, arguments, embeds, plan, cache)


def _step(handle: GistHandle, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of the step of `generate` that its cache was told of (generation.py), None of any other call.

    The call before it, of the same `generate`, was checked; what this one brings is a raw token for each sample.
    """
    cache, ids = arguments.get(CACHE), arguments.get("input_ids")
    if ids is None or arguments.get("attention_mask") is not None or arguments.get("position_ids") is not None:
        return None
    if type(cache) is FixedGistCache:
        return fixed_step(handle, arguments, ids)
    if type(cache) is not GistCache:
        return None
    plan = cache.steps.plan(ids, cache.state)
    if plan is None:
        return None
    cache.begin(plan, ids)
    arguments["input_ids"] = None
    # no mask, and transformers guesses no packed documents from the positions: there is a cache
    return _with_call(handle, arguments, handle.embed_words(ids), plan, cache)


def _with_call(
    handle: GistHandle, arguments: dict[str, Any], embeds: torch.Tensor | None, plan: CallPlan, cache: GistCache | None
) -> dict[str, Any]:
    """The arguments with what the layers and their attention need."""
    arguments["inputs_embeds"], arguments["position_ids"] = embeds, plan.position_ids
    arguments["use_cache"], arguments[CACHE] = cache is not None, cache
    arguments["gist_call"] = GistCall(plan.layout, handle.backend, handle.windows, cache)
    return arguments


def _planned_call(handle: GistHandle, given: dict[str, Any], call: Call) -> dict[str, Any]:
    """What `before_inner` adds to a call of `gistkern.compress`, which has checked and planned it beforehand."""
    plan, cache = call.plan, given[CACHE]
    cache.begin(plan)
    arguments = {**given, "attention_mask": plan.real}
    del arguments["gist_plan"]
    return _with_call(handle, arguments, _embedded(handle, call.words, call.rows, plan.layout.is_gist), plan, cache)


def _inputs(
    config: Any, arguments: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None, GistLayout | None]:
    """Ids or embeddings, and the layout if one is given; taken out of the arguments. Positions are broadcast."""
    ids, embeds = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    given, shape = (
        (ids, "input_ids [batch, tokens]") if embeds is None else (embeds, "inputs_embeds [batch, tokens, width]")
    )
    if not torch.is_tensor(given) or given.dim() != shape.count(",") + 1 or not given.shape[1]:
        found = tuple(given.shape) if torch.is_tensor(given) else type(given).__name__
        raise ValueError(f"expected {shape} with at least one token, got {found}")
    if arguments.get("output_attentions", config.output_attentions):
        raise ValueError("output_attentions is not available: the attention matrix is never formed")
    if arguments.get("position_ids") is not None:
        arguments["position_ids"] = broadcast_positions(arguments["position_ids"], given.shape[:2], given.device)
    return ids, embeds, arguments.pop("gist_layout", None)


def _is_gist(
    handle: GistHandle, ids: torch.Tensor | None, embeds: torch.Tensor | None, layout: GistLayout | None
) -> torch.Tensor:
    if ids is not None:
        return handle.is_gist(ids)
    assert embeds is not None
    return torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if layout is None else layout.is_gist


def _plan(
    handle: GistHandle,
    arguments: dict[str, Any],
    layout: GistLayout | None,
    is_gist: torch.Tensor,
    has_gists: bool | None,
    cache: GistCache | None,
    documents: torch.Tensor | None,
) -> CallPlan:
    """Layout and positions of the call's own rows, behind what the cache holds."""
    valid = _padding(arguments.get("attention_mask"), is_gist, cache)
    state = CacheState.empty(len(is_gist), is_gist.device) if cache is None or cache.state is None else cache.state
    if layout is None:
        plan = None
        if has_gists is False and valid is None and documents is None and cache is not None:
            plan = cache.steps.of_raw(is_gist.shape[1], state)
        if plan is None:
            kinds: dict[str, Any] = {"scheme": handle.positions, "sink_tokens": handle.sink_tokens}
            plan = plan_call(state, is_gist, valid, **kinds, documents=documents, has_gists=has_gists)
        if documents is None and arguments.get("position_ids") is not None:
            real = torch.ones_like(is_gist) if valid is None else valid
            check_positions(arguments.get("position_ids"), _guesses(plan, state), real)
        return plan
    positions = _given_positions(handle, arguments, layout, is_gist, state)
    if valid is not None and not torch.equal(valid, layout.is_real()):
        raise ValueError("attention_mask and gist_layout disagree about padding: pass the layout alone")
    return plan_layout(state, layout, positions, is_gist)


def _parallel(handle: GistHandle, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of this rank's shard, of those of the whole context."""
    if arguments.get(CACHE) is not None or arguments.get("use_cache"):
        raise ValueError(
            "a model patched with context_parallel reads whole contexts and caches none: pass use_cache=False, and "
            "compress or generate with a model patched without it"
        )
    ids, embeds, layout = _inputs(handle.inner.config, arguments)
    is_gist = _is_gist(handle, ids, embeds, layout)
    documents = None if layout is not None else packed_documents(arguments, is_gist.shape, is_gist.device)
    plan = _plan(handle, arguments, layout, is_gist, None, None, documents)
    assert handle.context_parallel is not None
    labels = arguments.get("shift_labels", arguments.get("labels"))
    kept = kept_columns(arguments, plan.layout.num_rows)
    check_same(plan.layout, handle.context_parallel, ids=ids, embeds=embeds, labels=labels, kept=kept)
    parallel = shard_of(plan.layout, handle.context_parallel, handle.row_cost, kept)
    take = parallel.shard.take
    return {
        **{name: value for name, value in arguments.items() if name != "attention_mask"},
        **({} if ids is None else {"input_ids": take(ids)}),
        **({} if embeds is None else {"inputs_embeds": take(embeds)}),
        "position_ids": take(plan.position_ids),
        "use_cache": False,
        "gist_parallel": parallel,
    }


def _shard_call(handle: GistHandle, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `before_inner` adds, for a shard."""
    parallel = arguments.pop("gist_parallel")
    ids, embeds, _ = _inputs(handle.inner.config, arguments)
    if ids is not None:
        embeds = embed(handle, ids, handle.is_gist(ids))
    handle.check_settings()
    layout = parallel.shard.layout
    return arguments | {
        "inputs_embeds": embeds,
        "attention_mask": layout.is_real(),
        "gist_call": GistCall(layout, handle.backend, handle.windows, parallel),
    }


def after_inner(handle: GistHandle, module: nn.Module, args: tuple, kwargs: dict[str, Any], output):
    """The call went through: the cache takes over its plan's state. Or it failed, and there is no output."""
    cache = kwargs.get(CACHE)
    if output is None:
        if isinstance(cache, (GistCache, FixedGistCache)):  # of a call that was refused it may be another's
            cache.abandon()
    elif cache is not None:
        cache.commit()


def embed(handle: GistHandle, ids: torch.Tensor, is_gist: torch.Tensor) -> torch.Tensor:
    """Token embeddings ``[B, N, hidden]`` in which gist ids take their learned rows."""
    rows = (ids - handle.first_id).clamp(0, handle.num_ids - 1)
    return _embedded(handle, ids.masked_fill(is_gist, 0), rows, is_gist)


def _embedded(handle: GistHandle, words: torch.Tensor, rows: torch.Tensor, is_gist: torch.Tensor) -> torch.Tensor:
    embeds = handle.embed_words(words)
    gists = handle.inner.gist_embeddings(rows)
    return torch.where(is_gist[..., None], gists.to(embeds.dtype), embeds)


def _bind(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments by their names; TypeError as an unpatched model's call raises it."""
    if not args:
        return named(kwargs)
    names = _NAMES.get(type(module))
    if names is None:
        names = _NAMES[type(module)] = _positional(type(module))
    if len(args) > len(names):
        raise TypeError(f"{type(module).__name__} takes up to {len(names)} positional arguments, got {len(args)}")
    given = dict(zip(names[: len(args)], args, strict=True))  # of one length: torch 2.9 compiles no other
    if twice := sorted(given.keys() & kwargs.keys()):
        raise TypeError(f"{type(module).__name__} got {', '.join(twice)} twice: by position and by name")
    return named({**given, **kwargs})


def _positional(cls: type) -> list[str]:
    """Names of a forward's positional arguments; of the class above where a subclass hands ``*args`` on."""
    for one in cls.__mro__:
        if "forward" in vars(one):
            parameters = list(inspect.signature(vars(one)["forward"]).parameters.values())[1:]
            if not any(each.kind is each.VAR_POSITIONAL for each in parameters):
                return [
                    each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
                ]
    return []


def _padding(attention_mask: Any, is_gist: torch.Tensor, cache: GistCache | None) -> torch.Tensor | None:
    """bool ``[B, N]`` of the call's own tokens, or None where none is padding."""
    if attention_mask is None:
        return None
    rows = is_gist.shape[1]
    if not torch.is_tensor(attention_mask):
        raise ValueError(f"attention_mask must be a tensor [batch, tokens], got {type(attention_mask).__name__}")
    if attention_mask.dim() == 2 and len(attention_mask) == 1:
        attention_mask = attention_mask.expand(len(is_gist), -1)
    if attention_mask.dim() != 2 or len(attention_mask) != len(is_gist) or attention_mask.shape[1] < rows:
        raise ValueError(
            f"attention_mask must be [batch, tokens] with at least the {rows} new tokens of {len(is_gist)} samples, "
            f"got {tuple(attention_mask.shape)}"
        )
    check_history(cache, attention_mask[:, : attention_mask.shape[1] - rows])
    # generate's mask also covers tokens that the cache has read; the last columns are this call's
    valid = check_padding(is_gist, attention_mask[:, -rows:])
    return None if bool(valid.all()) else valid


def _guesses(plan: CallPlan, state: CacheState) -> list[torch.Tensor]:
    """Positions that a caller may have guessed: counted over columns or real tokens, from where the cache may end."""
    columns = torch.arange(plan.layout.num_rows, device=plan.position_ids.device)
    starts: list[Any] = [0, state.length, state.fed, state.seen[:, None]]
    counted = [start + place for start in starts for place in (columns, plan.layout.stream_position)]
    return [plan.position_ids, *counted]


def _given_positions(
    handle: GistHandle, arguments: dict[str, Any], layout: GistLayout, is_gist: torch.Tensor, state: CacheState
) -> torch.Tensor:
    if (layout.batch_size, layout.num_rows) != tuple(is_gist.shape):
        raise ValueError(
            f"gist_layout is for {layout.batch_size} samples of {layout.num_rows} rows, "
            f"the call has {tuple(is_gist.shape)}"
        )
    if layout.device != is_gist.device:
        raise ValueError(f"gist_layout is on {layout.device}, the call on {is_gist.device}: use layout.to(device)")
    given = arguments.get("position_ids")
    if given is not None:
        return given
    start = state.tail_position + state.tail_rows
    return (layout.positions(handle.positions) + start[:, None]).masked_fill(~layout.is_real(), 0)
