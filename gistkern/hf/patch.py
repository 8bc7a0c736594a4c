"""`patch_llama`: gist masking for a transformers model."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from gistkern import backends
from gistkern.cache.reader import ATTRIBUTE, LOADED_UNPATCHED, adapters_with_rows, vocabulary_size
from gistkern.hf import call, generation
from gistkern.hf.attention import NAME, register
from gistkern.hf.checkpoint import save_pretrained, saved_rows
from gistkern.hf.context_parallel import group_of, row_cost
from gistkern.hf.embedding import GistEmbedding, embedded_sample, fresh_rows
from gistkern.hf.families import family_of, inner_model
from gistkern.hf.handle import GistHandle
from gistkern.hf.peft_state import has_adapters
from gistkern.hf.settings import (
    GistSettings,
    Training,
    agreed_settings,
    agreed_training,
    config_block,
    read_block,
)
from gistkern.hf.texts import check_prefix
from gistkern.hf.tokens import add_gist_tokens, check_tokenizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedTokenizerBase

__all__ = ["patch", "patch_llama"]


def patch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_gist_tokens: int = 10,
    positions: str = "absolute",
    sink_tokens: int = 1,
    backend: str = "auto",
    num_segment_gist_tokens: int = 0,
    context_parallel: ProcessGroup | DeviceMesh | None = None,
    context_prefix: list[int] | None = None,
    segment_length: int | None = None,
    segment_overlap: int = 0,
    chat: bool | None = None,
) -> GistHandle:
    """Give a transformers model gist tokens, in place. `patch_llama` is the same function by its first name.

    From then on ``model(input_ids)`` with gist tokens in it *is* gist-masked, with padding on either side;
    without gist tokens the model computes what it did before. Gist tokens get embeddings of their own (the
    model's matrices keep their shape, so it never generates one) and are ignored in `labels`.

    Parameters
    ----------
    model : PreTrainedModel
        A causal model or its inner model. Wrap it in a peft adapter after patching, with
        ``modules_to_save=["gist_embeddings"]``.
    tokenizer : PreTrainedTokenizerBase, optional
        Gets ``<gist_0>``, ``<gist_1>``, ... as special tokens (and keeps them after `unpatch`). Without one
        the ids follow the model's vocabulary.
    num_gist_tokens : int
        Gist tokens that close a context (or a segment).
    positions : str
        ``"absolute"`` or ``"gist_first"`` (docs/concepts/positions.md).
    sink_tokens : int
        First tokens of a document that stay visible.
    backend : str
        Passed to `gistkern.gist_attention`: ``"triton"`` keeps all layers on kernels that repeat themselves exactly.
    num_segment_gist_tokens : int
        Extra gist tokens that close the segments of a hierarchical compression, whose summary the
        `num_gist_tokens` then are. 0 for none.
    context_parallel : ProcessGroup or DeviceMesh, optional
        Ranks that share each context (docs/guides/many-gpus.md): all are called with the whole of it, each computes its
        shard's rows and logits, and `loss` is the whole context's on every rank. Average gradients over the group, as
        DDP and FSDP do.
    context_prefix, segment_length, segment_overlap, chat
        How contexts were made in training, as gistkern.json records it beside an adapter: the special tokens they began
        with, how they were cut, and whether through the chat template. `gistkern.ask` and the commands then do so too.

    Returns
    -------
    GistHandle
        Unpatches, also as a context manager. A model whose checkpoint was saved while patched gets its
        trained rows and settings back; settings given here must then agree with the saved ones.

    Raises
    ------
    TypeError
        For an unsupported model type.
    ValueError
        For bad settings, a model that is patched already, or one wrapped by peft.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    ...                      vocab_size=100)
    >>> model = LlamaForCausalLM(config)
    >>> with patch(model, num_gist_tokens=2) as handle:
    ...     handle.gist_token_ids
    [100, 101]
    """
    check_tokenizer(tokenizer)
    given = GistSettings(num_gist_tokens, positions, sink_tokens, num_segment_gist_tokens)
    trained = Training(context_prefix, segment_length, segment_overlap, chat)
    if backend != "auto":
        backends.get(backend)
    _check_unwrapped(model)
    family_of(model)
    inner = inner_model(model)
    if hasattr(model, ATTRIBUTE) or hasattr(inner, "gist_embeddings"):
        raise ValueError("the model is patched already: use model.gistkern_handle, or unpatch it first")
    saved = read_block(model.config)
    settings = given if saved is None else agreed_settings(saved, given)
    trained = agreed_training(saved, trained)
    if tokenizer is not None:
        check_prefix(trained.context_prefix, tokenizer, "the training")
    size = vocabulary_size(inner.get_input_embeddings(), model.config)
    if saved is not None and tokenizer is None:
        _check_first_id(saved, size)
    group = None if context_parallel is None else group_of(context_parallel)

    # parameters made under inference_mode could never be trained, also not later
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        words = embedded_sample(inner.get_input_embeddings(), size)
        rows = None if saved is None else saved_rows(model, saved.get("rows"))
        drawn = None
        if rows is None:
            drawn = rows = fresh_rows(words, settings.num_ids)
            drawn = None if drawn.is_meta else drawn.cpu().clone()
        elif rows.shape != (settings.num_ids, words.shape[1]):
            raise ValueError(
                f"the checkpoint's gist rows are {tuple(rows.shape)}, expected {(settings.num_ids, words.shape[1])} by "
                f"config.json of {model.config._name_or_path!r}: the two are not of one training"
            )
        rows = rows.to(words.device, words.dtype, copy=True)
        previous = _switch_attention(model, inner, undo)
        first_id = size if saved is None else saved["first_gist_id"]
        if tokenizer is not None:
            first_id = add_gist_tokens(tokenizer, settings.num_ids, None if saved is None else first_id)
        handle = GistHandle(
            model,
            inner,
            settings,
            first_id,
            ids_from_tokenizer=tokenizer is not None or (saved is not None and saved.get("ids_from_tokenizer", False)),
            backend=backend,
            context_parallel=group,
            row_cost=0.0 if group is None else row_cost(inner),
            drawn=drawn,
        )
        _install(handle, GistEmbedding(rows, settings.numbers(first_id)), previous | {"block": saved}, trained)
        undo.pop_all()
    return handle


patch_llama = patch


def _check_unwrapped(model: Any) -> None:
    """Raise ValueError for a model inside or with peft adapters."""
    if hasattr(model, "get_base_model") or (isinstance(model, PreTrainedModel) and has_adapters(model)):
        if adapters_with_rows(model) and not hasattr(model, ATTRIBUTE):
            raise ValueError(LOADED_UNPATCHED)
        raise ValueError(
            "patch the model before wrapping it with peft or loading an adapter, which then holds the gist rows: "
            'patch_llama(base); get_peft_model(base, LoraConfig(..., modules_to_save=["gist_embeddings"]))'
        )


def _check_first_id(saved: dict[str, Any], size: int) -> None:
    """Raise ValueError if gist ids of a checkpoint are words of the vocabulary, unless a tokenizer had given them."""
    first = saved["first_gist_id"]
    if first < size and not saved.get("ids_from_tokenizer", False):
        raise ValueError(
            f"the checkpoint's first_gist_id {first} lies inside the vocabulary of {size} tokens, which has been "
            "resized since or comes with a tokenizer: pass the tokenizer that knows the gist tokens, or let them "
            f"follow the vocabulary by model.config.gistkern['first_gist_id'] = {size}"
        )


def _switch_attention(model: Any, inner: Any, undo: ExitStack) -> dict[str, Any]:
    """Give the model a config of its own (others may share it) and let it attend by our function."""
    shared = model.config
    before = shared._attn_implementation
    if model is not inner:  # a whole model holds all that reads its config
        own = copy.copy(shared)
        holders = [module for module in model.modules() if vars(module).get("config") is shared]
        for module in holders:
            undo.callback(setattr, module, "config", shared)
            module.config = own
    else:
        undo.callback(model.set_attn_implementation, before)
    register()
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise RuntimeError(f"{type(model).__name__} kept attn_implementation={before!r}: it cannot be patched")
    return {"attention": "sdpa" if before == NAME else before}


def _install(handle: GistHandle, rows: GistEmbedding, previous: dict[str, Any], trained: Training) -> None:
    """Put rows, settings, hooks and methods in place; `GistHandle.unpatch` takes them back."""
    model, inner = handle.model, handle.inner
    inner.gist_embeddings = rows
    model.config.gistkern = config_block(handle.settings, handle.first_id, handle.ids_from_tokenizer, trained)
    handle.hooks = [
        inner.get_input_embeddings().register_forward_pre_hook(handle.refuse_gist_ids),
        inner.register_forward_pre_hook(partial(call.before_inner, handle), with_kwargs=True),
        inner.register_forward_hook(partial(call.after_inner, handle), with_kwargs=True, always_call=True),
    ]
    wrappers: dict[str, Any] = {"save_pretrained": save_pretrained}
    if model is not inner:
        handle.hooks += [
            model.register_forward_pre_hook(partial(call.before_model, handle), with_kwargs=True),
            model.register_forward_hook(partial(call.after_model, handle), with_kwargs=True),
        ]
        wrappers |= {"prepare_inputs_for_generation": generation.prepare_inputs, "generate": generation.generate}
    methods = {}
    for name, wrapper in wrappers.items():
        ours = generation.wrapped(wrapper, handle, getattr(model, name))
        methods[name] = (ours, vars(model).get(name))
        setattr(model, name, ours)
    handle.previous = previous | {"methods": methods}
    for module in (model, inner):
        setattr(module, ATTRIBUTE, handle)
