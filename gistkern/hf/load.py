"""`load`: a trained model, its tokenizer and its handle, from a checkpoint or a peft adapter."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from gistkern.cache.reader import vocabulary_size
from gistkern.files import parse_json
from gistkern.hf.patch import patch
from gistkern.hf.settings import GistSettings, Training, read_block
from gistkern.hf.texts import check_prefix

if TYPE_CHECKING:
    from gistkern.hf.handle import GistHandle

__all__ = ["four_bits", "is_trained", "load"]

_HUB = ("cache_dir", "token", "local_files_only", "force_download", "revision")
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def load(
    folder: str | os.PathLike, base: str | os.PathLike | None = None, **from_pretrained: Any
) -> tuple[Any, Any, GistHandle]:
    """Load what training saved: the model, patched and ready to answer, with its tokenizer.

    Parameters
    ----------
    folder : path or str
        What training saved, a folder or a hub name: a peft adapter, or a whole checkpoint of a patched model.
    base : path or str, optional
        Of an adapter: the model it was trained on, where that is not found by the name that the adapter gives.
    **from_pretrained
        For ``AutoModelForCausalLM.from_pretrained`` of the base or the checkpoint: ``device_map="cuda"``,
        ``dtype=torch.bfloat16``, ``quantization_config=BitsAndBytesConfig(load_in_4bit=True)``, ...; ``revision`` is
        that of `folder`.

    Returns
    -------
    model : PreTrainedModel or PeftModel
        Patched with the settings of its training, in evaluation mode.
    tokenizer : PreTrainedTokenizerBase or None
        The one saved in `folder`, else the base's; None where there is none.
    handle : GistHandle
        Of the patch. ``handle.training`` says how contexts were made.

    Raises
    ------
    ValueError
        If `folder` holds no trained gist rows, what it holds does not fit together, or the base cannot be found.
    ImportError
        If `folder` is an adapter and peft is missing.

    Examples
    --------
    >>> model, tokenizer, handle = gistkern.load("runs/mine")
    >>> type(model).__name__, len(handle.gist_token_ids), handle.training.segment_length
    ('LlamaForCausalLM', 2, None)
    """
    source = os.path.expanduser(os.fspath(folder))
    base = None if base is None else os.path.expanduser(os.fspath(base))
    if unknown := sorted({"subfolder", "output_loading_info", "state_dict", "config"} & from_pretrained.keys()):
        raise ValueError(
            f"load takes no {unknown[0]}: pass the folder that holds what training saved, and nothing in its place"
        )
    hub = {name: from_pretrained[name] for name in _HUB if name in from_pretrained}
    if _find_adapter(source, hub):
        return _load_adapter(source, base, hub, from_pretrained)
    if base is not None:
        raise ValueError(f"{source!r} is no peft adapter: leave base out, or pass the adapter's folder")
    return _load_checkpoint(source, hub, from_pretrained)


def four_bits(computed_in: torch.dtype) -> BitsAndBytesConfig:
    """How weights are loaded in 4 bits (NF4), in training and afterwards alike: other roundings are another model."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed_in)


def is_trained(folder: str | os.PathLike) -> bool:
    """Whether a folder or hub name holds what `load` takes; False for a model that was never patched."""
    source = os.fspath(folder)
    return _find_adapter(source, {}) or read_block(_from_pretrained(AutoConfig, source)) is not None


def _load_checkpoint(source: str, hub: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any, GistHandle]:
    trusted = {name: options[name] for name in ("trust_remote_code",) if name in options}
    block = read_block(_from_pretrained(AutoConfig, source, **hub, **trusted))
    if block is None:
        raise ValueError(
            f"{source!r} was not saved while patched, so it has no trained gist rows: pass what training saved, or "
            "train it (gistkern train; in Python after gistkern.patch(model))"
        )
    tokenizer = _tokenizer(source, hub)
    model = _from_pretrained(AutoModelForCausalLM, source, **options)
    from_tokenizer = block.get("ids_from_tokenizer", False)
    if from_tokenizer and tokenizer is None:
        raise ValueError(
            f"the gist tokens of {source!r} are its tokenizer's, which was not saved beside it: save it there"
        )
    handle = patch(model, tokenizer if from_tokenizer else None)
    return _checked(model, tokenizer, handle)


def _load_adapter(
    source: str, base: str | None, hub: dict[str, Any], options: dict[str, Any]
) -> tuple[Any, Any, GistHandle]:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"{source!r} is a peft adapter: pip install 'gistkern[train]'") from error
    config = _from_pretrained(PeftConfig, source, **hub)
    saved = getattr(config, "modules_to_save", None) or ()
    if not any(name.split(".")[-1] == "gist_embeddings" for name in ([saved] if isinstance(saved, str) else saved)):
        raise ValueError(
            f"the adapter {source!r} holds no gist rows: it was trained without modules_to_save=['gist_embeddings']"
        )
    settings, first_id, layers = _settings(source, hub)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter {source!r} names no base model: pass base=, its folder or hub name")
    options = {name: value for name, value in options.items() if name != "revision"}
    if config.revision:
        options["revision"] = config.revision
    model = _from_pretrained(AutoModelForCausalLM, base, hint=_BASE, **options)
    if block := getattr(model.config, "gistkern", None):  # a base that was trained before: the adapter's record counts
        model.config.gistkern = {name: value for name, value in block.items() if name not in vars(Training())}
    elsewhere = {name: value for name, value in hub.items() if name != "revision"}  # which is the adapter's
    tokenizer = _tokenizer(source, hub) or _tokenizer(base, elsewhere)
    # without one gist tokens follow the vocabulary; a tokenizer that knows them, or counts otherwise, gave their ids
    words = vocabulary_size(model.get_input_embeddings(), model.config)
    gave = tokenizer is not None and (first_id != words or "<gist_0>" in tokenizer.get_vocab())
    handle = patch(model, tokenizer if gave else None, **settings)
    if handle.first_id != first_id:
        raise ValueError(
            f"the gist tokens of {source!r} begin at id {first_id}, those of this base and tokenizer at "
            f"{handle.first_id}: pass the base that it was trained on, and save the tokenizer of the training beside it"
        )
    handle.adapter = source
    hub = {name: value for name, value in hub.items() if name != "force_download"}
    model = _adapted(PeftModel, model, source, hub, base, layers)
    return _checked(model.eval(), tokenizer, handle)


def _adapted(kind: Any, model: Any, source: str, hub: dict[str, Any], base: str, layers: int) -> Any:
    """The base with its adapter; ValueError where the adapter's tensors are others than the base has places for."""
    advice = (
        f"the adapter {source!r} does not fit the base {base!r}: pass base=, the model that it was trained on (with "
        "the vocabulary that it had then, if that was resized: save such a base)"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = kind.from_pretrained(model, source, **hub)
        except RuntimeError as error:
            raise ValueError(f"{advice} ({' '.join(str(error).split())[:300]})") from error
    for one in caught:
        if "missing adapter keys" in str(one.message):
            raise ValueError(f"{advice} ({str(one.message)[:300]})")
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if layers > model.get_base_model().config.num_hidden_layers:
        raise ValueError(f"{advice} (it has tensors for {layers} layers)")
    return model


def _checked(model: Any, tokenizer: Any, handle: GistHandle) -> tuple[Any, Any, GistHandle]:
    if tokenizer is not None:
        check_prefix(handle.training.context_prefix, tokenizer, "the training")
    handle.check_settings()
    return model, tokenizer, handle


def _settings(source: str, hub: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    """What to patch the base with, and the id of the first gist token: from gistkern.json and from beside the rows.

    And how many layers the adapter's file has tensors for, by the largest number in a name.
    """
    path = cached_file(source, "adapter_model.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise ValueError(
            f"the adapter {source!r} has no adapter_model.safetensors: save it by safetensors (peft's default)"
        )
    try:
        with safe_open(path, "pt") as tensors:
            keys = list(tensors.keys())
            name = next((key for key in keys if key.endswith("gist_embeddings.settings")), None)
            if name is None:
                raise ValueError(f"{path} holds no gist settings: it was saved by another version, or lost its rows")
            numbers = tensors.get_tensor(name).tolist()
    except SafetensorError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    try:
        settings = GistSettings.of_numbers(numbers)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}") from error
    found = cached_file(source, "gistkern.json", _raise_exceptions_for_missing_entries=False, **hub)
    stated = {} if found is None else parse_json(Path(found).read_bytes(), f"{found} is torn")
    known = {**vars(settings), **vars(Training())}
    if wrong := [
        name for name, value in stated.items() if name not in known or value != vars(settings).get(name, value)
    ]:
        raise ValueError(f"{found} and the rows beside it are not of one training: {wrong[0]} is {stated[wrong[0]]!r}")
    layers = [int(number[1]) + 1 for key in keys if (number := re.search(r"layers\.(\d+)\.", key))]
    return {**vars(settings), **stated}, numbers[-1], max(layers, default=0)


def _find_adapter(source: str, hub: dict[str, Any]) -> bool:
    given = Path(source)
    if not source or (not given.is_dir() and not _may_be_a_name(source)):
        raise ValueError(_nowhere(source))
    if given.is_dir() and not any((given / name).is_file() for name in ("config.json", "adapter_config.json")):
        inside = sorted(
            path.parent.name for path in given.glob("*/*config.json") if path.name != "tokenizer_config.json"
        )
        raise ValueError(
            f"{source!r} holds no model and no adapter"
            + (f", but the folders {', '.join(dict.fromkeys(inside))} in it do: pass one of them" if inside else "")
        )
    try:
        return find_adapter_config_file(source, **hub) is not None
    except OSError as error:
        raise ValueError(_unknown(source, error)) from error


def _tokenizer(source: str, hub: dict[str, Any]) -> Any:
    """The tokenizer saved there; None where there is none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, **hub}
    if all(cached_file(source, name, **quiet) is None for name in _TOKENIZER):
        return None
    return _from_pretrained(AutoTokenizer, source, **hub)


def _may_be_a_name(source: str) -> bool:
    """Of a model on a hub: one word, or two with a slash between them."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) is not None and not Path(source).exists()


def _nowhere(source: str) -> str:
    return f"there is no folder {source!r} (seen from {Path.cwd()})"


def _unknown(source: str, error: Exception) -> str:
    fetched = f", and no model of that name can be fetched ({_line(error)})" if _may_be_a_name(source) else ""
    return _nowhere(source) + fetched


def _line(error: Exception) -> str:
    """The first line of what another library says at length."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


_BASE = ": pass base= (on the command line --base), its folder or hub name, where it is now"


def _from_pretrained(loader: Any, source: str, hint: str = "", **options: Any) -> Any:
    try:
        return loader.from_pretrained(source, **options)
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds, all from what is in that folder or not
        if isinstance(error, OSError) and not Path(source).exists():
            raise ValueError(_unknown(source, error) + hint) from error
        raise ValueError(f"{source!r} cannot be loaded ({type(error).__name__}: {error}){hint}") from error
