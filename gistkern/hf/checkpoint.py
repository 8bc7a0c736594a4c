"""Gist rows in transformers checkpoints.

`save_pretrained` of a patched model writes the rows beside the weights, as ``...gist_embeddings.weight``.
`from_pretrained` drops them, because its class does not know them, and tells nobody which files it read. So patching
looks for them in the folder that the config names, and knows them by the digest that config.json holds.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from gistkern.cache.offload import on_device
from gistkern.hf.embedding import rows_in_use
from gistkern.hf.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gistkern.hf.handle import GistHandle

__all__ = ["save_pretrained", "saved_rows"]

_LOG = logging.getLogger(__name__)
_PREFIXES = ("model.", "", *{f"{family.decoder}." for family in FAMILIES.values()} - {"model."})
_KEYS = tuple(f"{prefix}gist_embeddings.weight" for prefix in _PREFIXES)
_EXPECTED = r"(^|\.)gist_embeddings\.(weight|settings)$"

# what transformers offers against a load report that calls the rows UNEXPECTED: patching fetches them afterwards
PreTrainedModel._keys_to_ignore_on_load_unexpected = [
    *(PreTrainedModel._keys_to_ignore_on_load_unexpected or ()),
    _EXPECTED,
]


def save_pretrained(handle: GistHandle, original: Any, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained`, which writes a digest of the rows into config.json, so that loading finds these."""
    config = handle.model.config
    block = config.gistkern
    given = inspect.signature(original).bind(*args, **kwargs).arguments.get("state_dict")
    if given is None:
        holder = rows_in_use(handle.inner.gist_embeddings)
        with on_device(holder):
            digest = _digest(holder.weight)
    else:
        digest = next((_digest(given[key]) for key in _KEYS if key in given), None)
    if digest is not None:
        config.gistkern = block | {"rows": digest}
    try:
        return original(*args, **kwargs)
    finally:
        config.gistkern = block


def saved_rows(model: PreTrainedModel, digest: str | None) -> torch.Tensor | None:
    """The gist rows of the checkpoint that a model with gist settings was loaded from; None if it was never loaded.

    Raises
    ------
    ValueError
        If they are not there, saying why as far as that can be seen.
    """
    source = model.config._name_or_path
    if not source:
        return None
    if source == "None":  # what from_pretrained(None, state_dict=...) leaves
        raise ValueError(
            "the model has gist settings and was loaded from a state_dict, whose gist rows from_pretrained drops. "
            "Patch first: model = LlamaForCausalLM(config), of your class; patch_llama(model); "
            "model.load_state_dict(state_dict)"
        )
    folders = _folders(source, getattr(model.config, "_commit_hash", None))
    found = _rows_in(folders)
    if digest not in (None, *map(_digest, found.values())) or not found:
        # from_pretrained(source, subfolder=...) leaves no trace of the subfolder
        below = _rows_in(folder.parent for top in folders for folder in sorted(_below(top)))
        if digest in map(_digest, below.values()) or (below and not found):
            found = below
            if digest is None:
                _check_alike(found, source)
    if not found:
        raise ValueError(_why_not(source, folders))
    right = [path for path, rows in found.items() if _digest(rows) == digest]
    if digest is not None and not right:
        _LOG.warning("the gist rows below %s are not those that its config.json was saved with", source)
    path = right[0] if right else next(iter(found))
    variants = {other: rows for other, rows in found.items() if other.parent == path.parent}
    _check_alike(variants, str(path.parent))
    path = min(variants, key=lambda one: (variants[one].dtype != model.dtype, one != path))
    _explain_report(model, path)
    return variants[path]


def _check_alike(found: dict[Path, torch.Tensor], place: str) -> None:
    """Raise ValueError if files, of which nobody knows which was loaded, differ in more than rounding."""
    first, *others = found.values()
    for rows in others:
        coarse = min(first.dtype, rows.dtype, key=lambda dtype: dtype.itemsize)
        if rows.shape != first.shape or not torch.equal(first.to(coarse), rows.to(coarse)):
            raise ValueError(
                f"files in {place!r} hold different gist rows ({', '.join(map(str, found))}), and which of them was "
                "loaded leaves no trace: load the model by a folder that holds one of them, from_pretrained(folder), "
                "instead of by subfolder= or variant="
            )


def _folders(source: str, revision: str | None) -> list[Path]:
    """Where the files of a checkpoint may lie: its folder, or the snapshots of a hub id (the one read last first)."""
    if Path(source).is_dir():
        return [Path(source)]
    if Path(source).is_absolute() or source.startswith("."):
        return []
    root = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="model"))
    if revision is None and (root / "refs/main").is_file():
        main = root / "snapshots" / (root / "refs/main").read_text().strip()
    else:
        main = root / "snapshots" / (revision or "")
    others = sorted(root.glob("snapshots/*")) if revision is None else []
    return [folder for folder in dict.fromkeys([main, *others]) if folder.is_dir() and folder != root / "snapshots"]


def _below(folder: Path) -> Iterable[Path]:
    """The config.json of checkpoints in subfolders."""
    return [*folder.glob("*/config.json"), *folder.glob("*/*/config.json")]


def _rows_in(folders: Iterable[Path]) -> dict[Path, torch.Tensor]:
    """Gist rows in the safetensors of folders: shards, variants, or a file of their own."""
    found: dict[Path, torch.Tensor] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(path, "pt") as tensors:
                names = set(tensors.keys())
                found.update((path, tensors.get_tensor(key)) for key in _KEYS if key in names)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
    return found


def _why_not(source: str, folders: list[Path]) -> str:
    problem = f"the checkpoint {source!r} has gist settings but no rows that can be found"
    if not folders:
        return (
            f"{problem}: there is no such folder (seen from {Path.cwd()}) or cached repository any more. Patch before "
            "it is moved or deleted or the working directory changes, or load it by its absolute path (a repository in "
            "another cache_dir too)"
        )
    pickles = sorted(path for folder in folders for path in folder.glob("*.bin"))
    if pickles:
        return (
            f"{problem}: they may be in {pickles[0]}, a pickle, which is not read here. Write them beside it: "
            f"weights = torch.load({str(pickles[0])!r}, weights_only=True); safetensors.torch.save_file("
            "{k: v for k, v in weights.items() if 'gist_embeddings' in k}, "
            f"{str(pickles[0].parent / 'gist_embeddings.safetensors')!r})"
        )
    return (
        f"{problem}: no *.safetensors in it has {_KEYS[0]}. If they were left out when it was saved (state_dict=?), "
        "save it again; if the settings are another model's, delete model.config.gistkern to start with fresh rows"
    )


def _explain_report(model: PreTrainedModel, path: Path) -> None:
    """Say that the rows are there, if transformers has just called them UNEXPECTED."""
    quiet = transformers_logging.get_verbosity() > logging.WARNING
    if _EXPECTED not in (model._keys_to_ignore_on_load_unexpected or ()) and not quiet:
        _LOG.warning(
            "gist rows taken from %s: transformers' load report, which calls gist_embeddings.* UNEXPECTED, was written "
            "before the model was patched (and is not where gistkern.hf.patch is imported first)",
            path,
        )


def _digest(rows: torch.Tensor) -> str | None:
    """Of the values; None where a process has only a part of them, or none."""
    if rows.is_meta or hasattr(rows, "full_tensor"):
        return None
    data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
