"""A vLLM connector that reads compressed documents from a `GistStore`: each request is answered from gist rows.

Run with vLLM 0.32 on CPU (docs/guides/vllm.md). vLLM needs no patch and no knowledge of gist tokens: a document is a
prefix whose keys and values happen to be known (`gistkern.plain_prefix`).

    from gistkern.serving import request_for, transfer_config

    llm = LLM(model, kv_transfer_config=transfer_config("corpus/"))       # the trained weights as a plain checkpoint
    prompts, parameters = zip(*(request_for(store, name, question_ids, max_tokens=32) for name, question_ids in queue))
    answers = llm.generate(prompts, parameters)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gistkern.corpus.store import GistStore
from gistkern.hf.prefix import plain_prefix, refuse_windows

try:
    from vllm import SamplingParams, TokensPrompt
    from vllm.config import KVTransferConfig, get_layers_from_vllm_config
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.logger import init_logger
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index
except ImportError as error:
    raise ImportError(
        f"gistkern.serving.vllm needs vLLM with the connector interface of 0.32 ({error}). It has pins of its own: "
        "install it into an environment of its own (docs/guides/vllm.md)"
    ) from error

__all__ = ["GistConnector", "request_for", "transfer_config"]

PLACEHOLDER = 0  # stands for a gist row in a prompt: counted, never embedded
NAME, ROWS = "gist_document", "gist_rows"  # of a request's kv_transfer_params
logger = init_logger(__name__)


def transfer_config(store: str | Path) -> KVTransferConfig:
    """What `LLM` and `vllm serve` take to answer from a store's folder.

    Parameters
    ----------
    store : str or Path
        A folder that `gistkern.compress_corpus` wrote; every process of the engine opens it by this path.

    Returns
    -------
    vllm.config.KVTransferConfig
        For ``kv_transfer_config``. A document that cannot be loaded fails its request, and no other.

    Examples
    --------
    ```python
    llm = vllm.LLM("plain/", kv_transfer_config=transfer_config("corpus/"))
    ```
    """
    return KVTransferConfig(
        kv_connector="GistConnector",
        kv_connector_module_path=__name__,
        kv_role="kv_consumer",
        kv_load_failure_policy="fail",
        kv_connector_extra_config={"store": str(store)},
    )


def request_for(
    store: GistStore, name: str, question_ids: Sequence[int], *, extra_args: Mapping[str, Any] | None = None, **sampling
) -> tuple[TokensPrompt, SamplingParams]:
    """A question about a document, as `LLM.generate` takes it.

    Parameters
    ----------
    store : GistStore
        Of the engine's folder.
    name : str
        The document's.
    question_ids : sequence of int
        What follows the context, at least one token.
    extra_args : mapping, optional
        Further ones of `SamplingParams`.
    **sampling
        All else that `SamplingParams` takes: max_tokens, temperature, ...

    Returns
    -------
    vllm.TokensPrompt, vllm.SamplingParams
        A prompt of as many placeholders as the document has rows, then the question, and what names the document.

    Notes
    -----
    Requests about one document share its whole blocks: the salt of vLLM's prefix cache is the document's name. (If a
    document is compressed again under its name, reset the engine's prefix cache.)

    Raises
    ------
    KeyError, ValueError
        If the store has no such document, or it is damaged; if the question is empty.

    Examples
    --------
    ```python
    question = tokenizer("Who signed it?").input_ids
    prompt, sampling = request_for(GistStore("corpus/"), "report-17", question, max_tokens=32)
    answer = llm.generate([prompt], [sampling])[0].outputs[0].text
    ```
    """
    if not question_ids:
        raise ValueError("the question is empty: give at least one token")
    rows = int(store[name].gist_rows[0])
    prompt = TokensPrompt(prompt_token_ids=[PLACEHOLDER] * rows + list(question_ids), cache_salt=name)
    extra = {**(extra_args or {}), "kv_transfer_params": {NAME: name, ROWS: rows}}
    return prompt, SamplingParams(**sampling, extra_args=extra)


@dataclass(frozen=True)
class Asked:
    """The document that a request names, and how many tokens of its prompt that stands for.

    With a `problem` the request cannot be served: all of its prompt that can be is claimed, so that it fails.
    """

    name: Any
    rows: int
    problem: str = ""


def asked_by(request: Any) -> Asked | None:
    """What a vLLM request asks; None for an ordinary one. Its parameters and prompt may come from anywhere."""
    given = request.kv_transfer_params or {}
    if not given.keys() & {NAME, ROWS}:
        return None
    name, rows, prompt = given.get(NAME), given.get(ROWS), request.prompt_token_ids or []
    if not isinstance(name, str):
        problem = f"{NAME} must be a string, got {name!r}"
    elif type(rows) is not int or not 1 <= rows < len(prompt):
        problem = f"{ROWS} must be a number from 1 to {len(prompt) - 1}, all tokens of the prompt but one, got {rows!r}"
    elif any(token != PLACEHOLDER for token in prompt[:rows]):
        problem = f"the prompt must begin with {rows} placeholders ({PLACEHOLDER})"
    elif request.cache_salt != name:
        problem = f"cache_salt must be the document's name, got {request.cache_salt!r}"
    else:
        return Asked(name, rows)
    return Asked(name, len(prompt) - 1, problem)


@dataclass(frozen=True)
class Load:
    """Rows from `first` on of what was asked, for the blocks of one request."""

    asked: Asked
    first: int
    blocks: list[int]

    def slots(self, block_size: int) -> torch.Tensor:
        """Where each row goes, in the numbering of vLLM's slot mappings."""
        row = torch.arange(self.first, self.asked.rows)
        return torch.tensor(self.blocks)[row // block_size] * block_size + row % block_size

    def own_blocks(self, block_size: int) -> set[int]:
        """Those that it fills: blocks before them may be shared with other requests."""
        return set((self.slots(block_size) // block_size).tolist())


@dataclass
class Loads(KVConnectorMetadata):
    """What the worker loads before a step."""

    loads: list[Load] = field(default_factory=list)


class GistConnector(KVConnectorBase_V1, SupportsHMA):
    """Tells the scheduler that a document's rows are there already, and writes them into the request's blocks.

    A request whose document cannot be read, or whose parameters make no sense, fails by itself.

    Examples
    --------
    ```python
    from vllm.config import KVTransferConfig

    config = KVTransferConfig(  # what transfer_config("corpus/") makes
        kv_connector="GistConnector",
        kv_connector_module_path="gistkern.serving.vllm",
        kv_role="kv_consumer",
        kv_load_failure_policy="fail",
        kv_connector_extra_config={"store": "corpus/"},
    )
    ```
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
        if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
            raise ValueError("GistConnector loads all heads and layers: use one process per model")
        if len(kv_cache_config.kv_cache_groups) > 1:
            raise ValueError("GistConnector serves models whose layers all have full attention")
        refuse_windows(vllm_config.model_config.hf_config)
        if transfer.kv_load_failure_policy != "fail":
            raise ValueError("placeholders cannot be recomputed: set kv_load_failure_policy='fail'")
        self._config = vllm_config
        self._block_size: int = vllm_config.cache_config.block_size
        self._store = GistStore(transfer.kv_connector_extra_config["store"])
        self._loads: list[Load] = []
        self._failed: set[int] = set()

    # ---- the scheduler's side

    def on_new_request(self, request: Any) -> None:
        """A document's rows are never computed, so caches are read whatever the request says (prompt_logprobs)."""
        if asked_by(request) is not None:
            request.skip_reading_prefix_cache = False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """The rows behind what vLLM's own prefix cache holds; loaded within the step."""
        asked = asked_by(request)
        return (0 if asked is None else max(0, asked.rows - num_computed_tokens)), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has its blocks, after a preemption new ones."""
        asked = asked_by(request)
        if asked is not None and num_external_tokens:
            (own,) = blocks.get_block_ids()
            self._loads.append(Load(asked, asked.rows - num_external_tokens, list(own)))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """The loads of this step."""
        loads, self._loads = self._loads, []
        return Loads(loads)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """Blocks are freed as usual."""
        return False, None

    # ---- the worker's side

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the rows as the engine writes keys and values that it computed itself."""
        loads = self._get_connector_metadata()
        assert isinstance(loads, Loads)
        for load in loads.loads:
            try:
                self._write(load)
            except Exception as error:  # whatever it is, the step belongs to other requests too
                logger.error("document %r is not loaded, its request fails: %s", load.asked.name, error)
                self._failed |= load.own_blocks(self._block_size)

    def _write(self, load: Load) -> None:
        if load.asked.problem:
            raise ValueError(load.asked.problem)
        prefix = plain_prefix(self._store[load.asked.name], self._config.model_config.hf_config)
        layers = get_layers_from_vllm_config(self._config, Attention)
        if len(layers) != len(prefix.layers):
            raise ValueError(f"{len(prefix.layers)} layers are stored, the model has {len(layers)}")
        if prefix.get_seq_length() != load.asked.rows:
            raise ValueError(f"{prefix.get_seq_length()} rows are stored, the request names {load.asked.rows}")
        slots = load.slots(self._block_size)
        for name, layer in layers.items():
            stored = prefix.layers[extract_layer_index(name)]
            keys, values = (t[0, :, load.first :].transpose(0, 1) for t in (stored.keys, stored.values))
            if (layer.num_kv_heads, layer.head_size) != keys.shape[1:]:
                raise ValueError(f"{tuple(keys.shape[1:])} heads and dimensions are stored, {name} has others")
            cache = layer.kv_cache
            keys, values = (t.contiguous().to(cache.device, layer.dtype) for t in (keys, values))
            layer.impl.do_kv_cache_update(layer, keys, values, cache, slots.to(cache.device))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that hold nothing useful."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved: documents are compressed with gistkern."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
