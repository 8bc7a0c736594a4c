"""`patch_llama`: gist masking for a transformers model, and the way back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gistkern import backends
from gistkern.hf import call
from gistkern.hf.adapters import adapter_for, inner_model
from gistkern.hf.attention_function import NAME, register
from gistkern.hf.context_parallel import group_of, row_cost
from gistkern.hf.embedding import GistEmbedding
from gistkern.hf.saved import agreed_settings, load_rows
from gistkern.hf.texts import agreed_prefix, check_prefix
from gistkern.positions import SCHEMES, check_scheme
from gistkern.schemes import check_count

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedTokenizerBase

__all__ = ["GistHandle", "handle_of", "patch_llama"]

_ATTRIBUTE = "gistkern_handle"
_DEFAULTS = {"num_gist_tokens": 10, "positions": "absolute", "sink_tokens": 1, "num_segment_gist_tokens": 0}


def patch_llama(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_gist_tokens: int = 10,
    positions: str = "absolute",
    sink_tokens: int = 1,
    backend: str = "auto",
    num_segment_gist_tokens: int = 0,
    context_parallel: ProcessGroup | DeviceMesh | None = None,
    context_prefix: list[int] | None = None,
) -> GistHandle:
    """Teach a Llama, Mistral, Qwen2 or Qwen3 model gist tokens, in place.

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
        ``"absolute"`` or ``"gist_first"`` (docs/mask.md).
    sink_tokens : int
        First tokens of a document that stay visible.
    backend : str
        Passed to `gistkern.gist_attention`.
    num_segment_gist_tokens : int
        Extra gist tokens that close the segments of a hierarchical compression, whose summary the
        `num_gist_tokens` then are. 0 for none.
    context_parallel : ProcessGroup or DeviceMesh, optional
        Ranks that share each context (docs/distributed.md): all are called with the whole of it, each computes its
        shard's rows and logits, and `loss` is the whole context's on every rank. Average gradients over the group, as
        DDP and FSDP do.
    context_prefix : list of int, optional
        Special tokens that contexts began with in training, as gistkern.json records them beside an adapter. Who makes
        contexts from texts later has to begin them so too.

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
    >>> with patch_llama(model, num_gist_tokens=2) as handle:
    ...     handle.gist_token_ids
    [100, 101]
    """
    given = {
        "num_gist_tokens": num_gist_tokens,
        "positions": positions,
        "sink_tokens": sink_tokens,
        "num_segment_gist_tokens": num_segment_gist_tokens,
    }
    check_count("num_gist_tokens", num_gist_tokens, least=1)
    check_count("sink_tokens", sink_tokens)
    check_count("num_segment_gist_tokens", num_segment_gist_tokens)
    check_scheme(positions)
    if backend != "auto":
        backends.get(backend)
    if hasattr(model, "get_base_model") or getattr(model, "peft_config", None):
        raise ValueError(
            "patch the model before wrapping it with peft or loading an adapter, which then holds the gist rows: "
            'patch_llama(base); get_peft_model(base, LoraConfig(..., modules_to_save=["gist_embeddings"]))'
        )
    adapter_for(model)
    if hasattr(model, _ATTRIBUTE) or hasattr(inner_model(model), "gist_embeddings"):
        raise ValueError("the model is patched already: use model.gistkern_handle, or unpatch it first")
    saved = getattr(model.config, "gistkern", None)
    settings = given if saved is None else agreed_settings(saved, given, _DEFAULTS)
    prefix = agreed_prefix(None if saved is None else saved.get("context_prefix"), context_prefix)
    if tokenizer is not None:
        check_prefix(prefix, tokenizer, "the training")
    handle = GistHandle(model, tokenizer, backend, saved, **settings, context_parallel=context_parallel)
    handle.context_prefix = prefix
    return handle


def handle_of(model: Any) -> GistHandle:
    """The handle of a patched model (also seen through a peft wrapper); ValueError if it is not patched."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = getattr(base, _ATTRIBUTE, None)
    if handle is None:
        raise ValueError("the model knows no gist tokens: call gistkern.patch_llama(model) first")
    return handle


class GistHandle:
    """A patched model's gist settings, and the way back. Made by `patch_llama`.

    Attributes
    ----------
    gist_token_ids : list of int
        Ids of the tokens that close a context; `segment_gist_token_ids` those of hierarchical segments.
    model, inner : nn.Module
        The patched model and its inner model.
    context_parallel : ProcessGroup or None
        Ranks that share each context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        backend: str,
        saved: dict[str, Any] | None,
        *,
        num_gist_tokens: int,
        positions: str,
        sink_tokens: int,
        num_segment_gist_tokens: int,
        context_parallel: Any = None,
    ) -> None:
        self.model = model
        self.inner = inner_model(model)
        self.backend = backend
        self.context_parallel = None if context_parallel is None else group_of(context_parallel)
        self.row_cost = 0.0 if context_parallel is None else row_cost(self.inner)
        self.positions, self.sink_tokens = positions, sink_tokens
        self.num_ids = num_gist_tokens + num_segment_gist_tokens
        self.first_id = _first_id(tokenizer, self.num_ids, model.config.vocab_size, saved)
        ids = list(range(self.first_id, self.first_id + self.num_ids))
        self.gist_token_ids, self.segment_gist_token_ids = ids[:num_gist_tokens], ids[num_gist_tokens:]
        self._checked: tuple[torch.Tensor, int] | None = None

        vocabulary = self.inner.get_input_embeddings().weight
        self._settings = [
            num_gist_tokens,
            num_segment_gist_tokens,
            SCHEMES.index(positions),
            sink_tokens,
            self.first_id,
        ]
        rows = GistEmbedding(vocabulary, self.num_ids, self._settings)
        if saved is not None:
            load_rows(model, rows)
        self._previous_config = saved
        self._previous_attention = model.config._attn_implementation
        register()
        model.set_attn_implementation(NAME)
        self.inner.gist_embeddings = rows
        model.config.gistkern = {
            "num_gist_tokens": num_gist_tokens,
            "num_segment_gist_tokens": num_segment_gist_tokens,
            "positions": positions,
            "sink_tokens": sink_tokens,
            "first_gist_id": self.first_id,
        }
        self._hooks = [
            self.inner.register_forward_pre_hook(partial(call.before_inner, self), with_kwargs=True),
            self.inner.register_forward_hook(partial(call.after_inner, self), with_kwargs=True),
        ]
        if model is not self.inner:
            self._hooks.append(model.register_forward_pre_hook(partial(call.before_model, self), with_kwargs=True))
            self._hooks.append(model.register_forward_hook(partial(call.after_model, self), with_kwargs=True))
            for name, wrapper in (("prepare_inputs_for_generation", call.prepare_inputs), ("generate", call.generate)):
                setattr(model, name, partial(wrapper, self, getattr(model, name)))
        setattr(model, _ATTRIBUTE, self)

    @property
    def context_prefix(self) -> list[int] | None:
        """Special tokens that contexts begin with, as trained; None where nobody knows. Saved with the model."""
        return self.model.config.gistkern.get("context_prefix")

    @context_prefix.setter
    def context_prefix(self, ids: list[int] | None) -> None:
        if ids is not None:
            self.model.config.gistkern["context_prefix"] = list(ids)

    def is_gist(self, ids: torch.Tensor) -> torch.Tensor:
        """bool, like `ids`: which are gist tokens."""
        return (ids >= self.first_id) & (ids < self.first_id + self.num_ids)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that the patch added: the gist rows (the trained copy, under a peft adapter)."""
        return [p for p in self.inner.gist_embeddings.parameters() if p.requires_grad]

    def check_settings(self) -> None:
        """Raise ValueError if the mask is off, or the gist rows in use were trained under other settings or not saved.

        Rows loaded with a peft adapter bring the settings they were trained with.
        """
        current = self.model.config._attn_implementation
        if current != NAME:
            raise ValueError(
                f"attn_implementation was set to {current!r} after patching, which takes the gist mask off: set it "
                "before patch_llama, or unpatch first"
            )
        rows = self.inner.gist_embeddings
        configs = getattr(self.model, "peft_config", None) or {}
        for name, config in configs.items():
            if "gist_embeddings" not in (getattr(config, "modules_to_save", None) or ()):
                raise ValueError(
                    f"the adapter {name!r} would neither train nor save the gist rows: "
                    'pass modules_to_save=["gist_embeddings"] in its config'
                )
        if configs and not hasattr(rows, "modules_to_save"):
            raise ValueError("the adapter was loaded beside the gist rows instead of around them: patch first")
        active = getattr(rows, "active_adapter", None)
        holder = rows.modules_to_save[active] if active in getattr(rows, "modules_to_save", ()) else rows
        settings = getattr(holder, "original_module", holder).settings
        # the tensor itself is kept, so that its id cannot be another one's
        if self._checked is not None and self._checked[0] is settings and self._checked[1] == settings._version:
            return
        if settings.tolist() != self._settings:
            raise ValueError(
                f"the gist rows were trained with {_spelled(settings.tolist())}; the model is patched with "
                f"{_spelled(self._settings)}: patch it with the settings of the training"
            )
        self._checked = (settings, settings._version)

    def unpatch(self) -> None:
        """Take everything back: the model is bit for bit what it was. Calling it again does nothing."""
        if getattr(self.model, _ATTRIBUTE, None) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        if self.model is not self.inner:
            del self.model.prepare_inputs_for_generation, self.model.generate
        del self.inner.gist_embeddings
        delattr(self.model, _ATTRIBUTE)
        if self._previous_config is None:
            del self.model.config.gistkern
        else:
            self.model.config.gistkern = self._previous_config
        self.model.set_attn_implementation(self._previous_attention)

    def __enter__(self) -> GistHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()


def _spelled(settings: list[int]) -> str:
    gists, segment_gists, scheme, sinks, first = settings
    return (
        f"num_gist_tokens={gists}, num_segment_gist_tokens={segment_gists}, positions={SCHEMES[scheme]!r}, "
        f"sink_tokens={sinks}, first id {first}"
    )


def _first_id(
    tokenizer: PreTrainedTokenizerBase | None, count: int, vocab_size: int, saved: dict[str, Any] | None
) -> int:
    """Id of the first of `count` consecutive gist tokens, which the tokenizer gets if there is one."""
    if tokenizer is None:
        return vocab_size if saved is None else saved["first_gist_id"]
    tokens = [f"<gist_{i}>" for i in range(count)]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    ids: list[int] = [tokenizer.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]
    if ids != list(range(ids[0], ids[0] + count)):
        raise ValueError(f"the tokenizer gave the gist tokens ids that do not follow each other: {ids}")
    if saved is not None and saved["first_gist_id"] != ids[0]:
        raise ValueError(
            f"the tokenizer's gist tokens begin at id {ids[0]}, the checkpoint's at {saved['first_gist_id']}: "
            "pass the tokenizer that the model was trained with"
        )
    return ids[0]
