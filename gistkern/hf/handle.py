"""A patched model's gist settings and rows, and the way back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Hashable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gistkern.cache.fingerprint import adapters_in_use, fingerprint, weights_in_use
from gistkern.cache.offload import on_device
from gistkern.cache.reader import ATTRIBUTE, adapters_with_rows, patched, vocabulary_size
from gistkern.cache.windows import layer_windows
from gistkern.hf.attention import NAME
from gistkern.hf.embedding import GistEmbedding, rows_in_use
from gistkern.hf.peft_state import active_adapters, adapter_parameters, trains_biases
from gistkern.hf.settings import Training
from gistkern.layout.positions import SCHEMES

if TYPE_CHECKING:
    from gistkern.hf.settings import GistSettings

__all__ = ["GistHandle", "handle_of"]


def handle_of(model: Any) -> GistHandle:
    """The handle of a patched model, also seen through wrappers (peft, DDP, FSDP, torch.compile).

    Raises
    ------
    ValueError
        If the model is not patched, or wrapped so that gist tokens would not reach the patch.
    """
    return patched(model)  # type: ignore[return-value]


_NOWHERE = "the model's weights are on the meta device, where nothing can be computed: load them before patching"


class GistHandle:
    """The gist settings of a patched model, and the way to take the patch off. `gistkern.patch` returns one.

    Attributes
    ----------
    gist_token_ids : list of int
        Ids of the tokens that close a context; `segment_gist_token_ids` those of hierarchical segments.
    model, inner : nn.Module
        The patched model and its inner model.
    context_parallel : ProcessGroup or None
        Ranks that share each context.
    adapter : str or None
        Folder or name of the adapter that `gistkern.load` put on the model.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> handle.gist_token_ids, handle.positions, handle.sink_tokens
    ([384, 385], 'absolute', 1)
    >>> handle.unpatch()
    """

    def __init__(
        self,
        model: Any,
        inner: Any,
        settings: GistSettings,
        first_id: int,
        *,
        ids_from_tokenizer: bool,
        backend: str,
        context_parallel: Any = None,
        row_cost: float = 0.0,
        drawn: torch.Tensor | None = None,
    ) -> None:
        self.model, self.inner = model, inner
        self.backend = backend
        self.context_parallel, self.row_cost = context_parallel, row_cost
        self.positions, self.sink_tokens = settings.positions, settings.sink_tokens
        self.windows = layer_windows(inner.config)
        self.first_id, self.num_ids = first_id, settings.num_ids
        ids = list(range(first_id, first_id + self.num_ids))
        self.gist_token_ids, self.segment_gist_token_ids = (
            ids[: settings.num_gist_tokens],
            ids[settings.num_gist_tokens :],
        )
        self.settings = settings
        self.adapter: str | None = None
        self.hooks: list[Any] = []  # what patch_llama registered, and has to take back
        self.previous: dict[str, Any] = {}
        self._vocabulary = vocabulary_size(inner.get_input_embeddings(), model.config)
        self.ids_from_tokenizer = ids_from_tokenizer
        self._drawn = drawn  # the values that the rows began with, on the CPU; None if they were loaded
        self._untrained: tuple[torch.Tensor, int, bool] | None = None
        self._checked: tuple[torch.Tensor, int] | None = None
        self._warned = self._embedding = False
        self._cuts: set[tuple[int | None, int]] = set()  # other than the training's, and warned of

    def __repr__(self) -> str:
        return f"GistHandle({type(self.model).__name__}, {_spelled(self.settings.numbers(self.first_id))})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GistHandle:
        """A copied model has a handle of its own. A part of it, as peft copies the embedding, keeps this one.

        Else the part's hook would bring a second model with it.
        """
        if id(self.model) not in memo and id(self.inner) not in memo:
            return self
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @property
    def training(self) -> Training:
        """How contexts were made in training, as far as that is known. Saved with the model."""
        if getattr(self.model, ATTRIBUTE, None) is not self:
            raise ValueError("the model is not patched any more")
        block = self.model.config.gistkern
        return Training(**{name: block[name] for name in Training.__dataclass_fields__ if name in block})

    def record(self, **known: Any) -> None:
        """Set fields of `training`: who trains knows them, and `gistkern.ask` and the commands read them later.

        Raises
        ------
        TypeError, ValueError
            For a field that there is not, or a value that it cannot have.

        Examples
        --------
        >>> model, tokenizer, handle = gistkern.load("runs/mine")
        >>> handle.record(segment_length=512, segment_overlap=32)
        >>> handle.training.segment_length
        512
        """
        found = replace(self.training, **copy.deepcopy(known))
        block = {name: value for name, value in self.model.config.gistkern.items() if name not in vars(found)}
        self.model.config.gistkern = block | found.stated()

    def arguments(self) -> dict[str, Any]:
        """The arguments that `gistkern.patch` needs to patch a fresh base model alike (what gistkern.json holds).

        Examples
        --------
        >>> model, tokenizer, handle = gistkern.load("runs/mine")
        >>> handle.arguments()["num_gist_tokens"]
        2
        """
        return asdict(self.settings) | self.training.stated()

    def is_gist(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of `ids` are gist tokens: bool, of the same shape."""
        return (ids >= self.first_id) & (ids < self.first_id + self.num_ids)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that the patch added: the gist rows (the active adapter's copy, under peft).

        They take gradients from then on, also where the whole model was frozen before.

        Examples
        --------
        >>> model, tokenizer, handle = gistkern.load("runs/mine")
        >>> [tuple(parameter.shape) for parameter in handle.trainable_parameters()]
        [(2, 64)]
        """
        rows = rows_in_use(self.inner.gist_embeddings).requires_grad_()
        return list(rows.parameters())

    def freeze_base(self) -> list[nn.Parameter]:
        """Train the gist rows alone, beside whatever adapters train: no other weight of the model takes gradients.

        Returns
        -------
        list of nn.Parameter
            What is trained, for an optimizer.

        Examples
        --------
        >>> model, tokenizer, handle = gistkern.load("runs/mine")
        >>> optimizer = torch.optim.AdamW(handle.freeze_base(), lr=1e-2)
        """
        kept = adapter_parameters(self.model)
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in kept and not (name.endswith(".bias") and trains_biases(self.model)):
                parameter.requires_grad_(False)
        self.trainable_parameters()
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def fingerprint(self) -> str:
        """Hex digest of the weights in use, by which a cache knows its model again."""
        return fingerprint(self.inner)

    def weights_in_use(self) -> tuple[int, Hashable]:
        """A value that changes when the weights are trained, or another adapter is activated."""
        return weights_in_use(self.inner)

    def adapters_in_use(self) -> Hashable:
        """A value that changes when another adapter is activated."""
        return adapters_in_use(self.inner)

    def embed_words(self, ids: torch.Tensor) -> torch.Tensor:
        """The model's own embedding of ids that are no gist tokens."""
        embedding = self.inner.get_input_embeddings()
        weight = getattr(embedding, "weight", None)
        if torch.is_tensor(weight) and weight.is_meta and not ids.is_meta and not hasattr(embedding, "_hf_hook"):
            raise ValueError(_NOWHERE)
        if hasattr(weight, "full_tensor") and hasattr(self.model, "unshard") and not hasattr(embedding, "unshard"):
            raise ValueError(
                "fully_shard keeps the embedding in parts outside the model's own forward, and the inner model was "
                "called by itself (gistkern.compress does so): call model.unshard() first, on every rank"
            )
        self._embedding = True
        try:
            return embedding(ids)
        finally:
            self._embedding = False

    def refuse_gist_ids(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook of the model's embedding: others who call it (prompt tuning does) would miss the gist rows."""
        if self._embedding or torch.compiler.is_compiling() or not args or not torch.is_tensor(args[0]):
            return
        if not args[0].is_meta and bool(self.is_gist(args[0]).any()):
            raise ValueError(
                "gist tokens have no rows in the model's own embedding: pass input_ids to the model, which embeds them "
                "(prompt tuning embeds ids itself, and does not go together with gist tokens)"
            )

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
        self._check_vocabulary()
        rows = rows_in_use(self.inner.gist_embeddings)
        if getattr(self.model, "peft_config", None):
            self._check_adapters(rows)
        settings = rows.settings
        # the tensor itself is kept, so that its id cannot be another one's
        if self._checked is not None and self._checked[0] is settings and self._checked[1] == _version(settings):
            return
        with on_device(rows):
            if rows.settings.is_meta:
                raise ValueError(_NOWHERE)
            found = rows.settings.tolist()
        if found != self.settings.numbers(self.first_id):
            raise ValueError(
                f"the gist rows were trained with {_spelled(found)}; the model is patched with "
                f"{_spelled(self.settings.numbers(self.first_id))}: patch it with "
                + (
                    "the settings of the training"
                    if found[:-1] != self.settings.numbers(self.first_id)[:-1]
                    else "the tokenizer of the training, which gave these ids, or without one if there was none"
                )
            )
        self._checked = (settings, _version(settings))

    def _check_vocabulary(self) -> None:
        """New tokens of the vocabulary must not be taken for gist tokens; a tokenizer gives each an id of its own."""
        size = vocabulary_size(self.inner.get_input_embeddings(), self.model.config)
        if size > max(self._vocabulary, self.first_id) and not self.ids_from_tokenizer:
            if self.first_id + self.num_ids <= self._vocabulary:
                return
            raise ValueError(
                f"the vocabulary was resized from {self._vocabulary} to {size} tokens after patching, and the gist "
                f"tokens have the ids {self.first_id} to {self.first_id + self.num_ids - 1}: resize it before "
                f"patch_llama, or pass patch_llama the tokenizer, which keeps them apart (resize_token_embeddings"
                f"({self._vocabulary}) goes back)"
            )

    def _check_adapters(self, rows: GistEmbedding) -> None:
        """An active adapter whose training would leave fresh gist rows behind is an error."""
        active = active_adapters(self.inner)
        if rows is not getattr(self.inner.gist_embeddings, "original_module", self.inner.gist_embeddings):
            return  # an adapter's own
        for name in active:
            if name in adapters_with_rows(self.model):
                raise ValueError("the adapter was loaded beside the gist rows instead of around them: patch first")
        if active and self.untrained():
            raise ValueError(
                f"the adapter {active[0]!r} would neither train nor save the gist rows: "
                'pass modules_to_save=["gist_embeddings"] in its config'
            )

    def untrained(self) -> bool:
        """Whether the gist rows in use still are what patching drew."""
        if self._drawn is None:
            return False
        rows = rows_in_use(self.inner.gist_embeddings)
        weight = rows.weight
        known = self._untrained
        if known is None or known[0] is not weight or known[1] != _version(weight):
            with on_device(rows):
                self._untrained = known = (weight, _version(weight), _equal(rows.weight, self._drawn))
        return known[2]

    def warn_if_untrained(self, stacklevel: int = 4) -> None:
        """Say once, outside training, that rows which were never trained carry nothing of a context."""
        if not self._warned and not self.model.training and self.untrained():
            self._warned = True
            warnings.warn(
                "the gist rows were never trained, so a compressed context says nothing yet: train them "
                "(gistkern.training), or load a checkpoint or an adapter that holds trained ones",
                UserWarning,
                stacklevel=stacklevel,
            )

    def warn_if_cut_otherwise(self, segment_length: int | None, segment_overlap: int, stacklevel: int = 4) -> None:
        """Say once that contexts are cut otherwise than in training, where that is known: the rows were never so."""
        trained = self.training
        wanted, given = (trained.segment_length, trained.segment_overlap), (segment_length, segment_overlap)
        if trained.segment_length is not None and given != wanted and given not in self._cuts:
            self._cuts.add(given)
            warnings.warn(
                f"the context is compressed with segment_length={segment_length}, segment_overlap={segment_overlap}; "
                f"the model was trained with {wanted[0]} and {wanted[1]} (handle.training)",
                UserWarning,
                stacklevel=stacklevel,
            )

    def unpatch(self) -> None:
        """Take everything back: the model is bit for bit what it was. Calling it again does nothing.

        Examples
        --------
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        ...                                      num_attention_heads=2, vocab_size=100))
        >>> with gistkern.patch(model, num_gist_tokens=2) as handle:  # the end of the block unpatches too
        ...     cache = gistkern.compress(model, torch.tensor([[5, 6, 7]]))
        >>> hasattr(model, "gistkern_handle")
        False
        """
        if getattr(self.model, ATTRIBUTE, None) is not self:
            return
        for hook in self.hooks:
            hook.remove()
        for name, (ours, before) in self.previous["methods"].items():
            if vars(self.model).get(name) is ours:  # else somebody has wrapped it since
                delattr(self.model, name)
                if before is not None:
                    setattr(self.model, name, before)
        del self.inner.gist_embeddings
        for module in {self.model, self.inner}:
            delattr(module, ATTRIBUTE)
        if self.previous["block"] is None:
            del self.model.config.gistkern
        else:
            self.model.config.gistkern = self.previous["block"]
        self.model.set_attn_implementation(self.previous["attention"])

    def __enter__(self) -> GistHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()


def _version(tensor: torch.Tensor) -> int:
    """Counts what was written to a tensor; of one made under inference_mode nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def _equal(rows: torch.Tensor, drawn: torch.Tensor) -> bool:
    """Whether `rows` are `drawn`, perhaps after rounding (``model.half()`` and back)."""
    if rows.is_meta or hasattr(rows, "full_tensor") or rows.shape != drawn.shape:
        return False  # a process that holds a part, or none: nobody knows
    found = rows.detach().cpu()
    return any(
        torch.equal(found, drawn.to(rounded).to(found.dtype)) for rounded in (drawn.dtype, torch.half, torch.bfloat16)
    )


def _spelled(settings: list[int]) -> str:
    gists, segment_gists, scheme, sinks, first = settings
    positions = SCHEMES[scheme] if scheme in range(len(SCHEMES)) else scheme
    return (
        f"num_gist_tokens={gists}, num_segment_gist_tokens={segment_gists}, positions={positions!r}, "
        f"sink_tokens={sinks}, first id {first}"
    )
