"""A compressed context on disk: one safetensors file with its settings, checksum and model fingerprint.

A checksum says that a file is what somebody wrote, not that it makes sense: `load` holds every number against the
tensors before a cache is made of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from gistkern.cache.cache import GistCache, GistLayer
from gistkern.cache.offload import input_device
from gistkern.cache.plan import CacheState
from gistkern.cache.reader import patched
from gistkern.cache.tokens_read import PADDING, UNKNOWN, ContextRead, TokensRead
from gistkern.files import field_of, parse_json, read_bytes, replacing
from gistkern.layout.positions import SCHEMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_device", "finite", "load", "save"]

_FORMAT = "gistkern-cache-1"
# a field of CacheState is a line here: tensors (int64 [B], or bool of B by so many columns), numbers with their type
_STATE_TENSORS = {"seen": "", "gist_rows": "", "tail_rows": "", "tail_position": "", "tail_is_gist": "tail_columns"}
_STATE_NUMBERS: dict[str, type] = {
    "gist_columns": int,
    "tail_columns": int,
    "length": int,
    "fed": int,
    "tail_has_gists": bool,
    "moving": bool,
}
_OVERFLOW = "the model overflowed, compute in bfloat16 or float32"
_MOST = 2**31 - 1  # positions and columns are int32 in a layout
_ROW_DTYPES = {
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int8"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}


# a number is inf or NaN where all bits of its exponent are set
_EXPONENT = {
    torch.float64: (torch.int64, 0x7FF0 << 48),
    torch.float32: (torch.int32, 0x7F80 << 16),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


def save(cache: GistCache, path: str | os.PathLike) -> None:
    """See `GistCache.save`."""
    state = cache._state()
    if cache.fingerprint is None and cache.is_signed:
        raise ValueError(
            "the model that wrote the cache is gone, or its weights were changed since, and a file names its model: "
            "save before, or compress again"
        )
    tensors = {f"state.{name}": getattr(state, name) for name in _STATE_TENSORS}
    read = cache.read.ids()
    tensors["read"] = torch.empty(len(state.seen), 0, dtype=torch.int32) if read is None else read.int()
    for index, layer in enumerate(cache.layers):
        tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = layer.keys, layer.values
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header: dict[str, Any] = {
        "format": _FORMAT,
        "positions": cache.positions,
        "fingerprint": cache.fingerprint,
        "contexts": sorted(map(str, cache.contexts)),
        "layers": len(cache.layers),
        "state": {name: getattr(state, name) for name in _STATE_NUMBERS},
    }
    for name, tensor in tensors.items():
        if name.startswith("layers.") and not finite(tensor):
            warnings.warn(f"{name} holds inf or NaN, which GistCache.load refuses: {_OVERFLOW}", stacklevel=3)
            break
    header["sha256"] = _checksum(tensors, header)
    with replacing(path) as draft:
        safetensors.save_file(tensors, draft, metadata={"gistkern": json.dumps(header)})


def load(path: str | os.PathLike, model: PreTrainedModel | None, device: torch.device | str) -> GistCache:
    """See `GistCache.load`."""
    device = check_device(device) if model is None else input_device(patched(model).inner)
    header, tensors = _read(path)
    _check(header, tensors, f"{path} was not written by GistCache.save")
    cache = GistCache()
    cache.positions, cache.fingerprint = header["positions"], header["fingerprint"]
    state: dict[str, Any] = {
        name: tensors[f"state.{name}"].to(device, torch.bool if columns else torch.int64)
        for name, columns in _STATE_TENSORS.items()
    }
    cache.state = CacheState(**state, **header["state"])
    for index in range(header["layers"]):
        keys, values = (tensors[f"layers.{index}.{name}"].to(device) for name in ("keys", "values"))
        cache.layers.append(GistLayer.holding(keys, values))
    cache.read = TokensRead(tensors["read"].to(device, torch.int64))
    cache.contexts = set(map(ContextRead.parse, header["contexts"]))
    if model is not None:
        from gistkern.cache.fingerprint import check_cache

        check_cache(cache, model)
    return cache


def check_device(given: torch.device | str) -> torch.device:
    """The device; ValueError where there is none of that name here, or it holds no data."""
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise ValueError(f"device={given!r} cannot be used here ({str(error).splitlines()[0]})") from error
    if device.type == "meta":
        raise ValueError("device='meta' holds no data: pass the device of the model")
    return device


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file that is whole.

    The bytes are read, not mapped: a file that somebody cuts while it is mapped ends the process.
    """
    content = read_bytes(path)
    try:
        tensors = safetensors.load(content)
    except (SafetensorError, KeyError, AssertionError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is torn or no safetensors file ({error}): compress the context again") from error
    size = int.from_bytes(content[:8], "little")
    about = parse_json(content[8 : 8 + size], f"the header of {path}").get("__metadata__") or {}  # may be null
    header = parse_json(about.get("gistkern", "{}"), f"the header of {path}")
    if header.get("format") != _FORMAT:
        found = reprlib.repr(header.get("format"))
        raise ValueError(f"{path} is not a gist cache of format {_FORMAT!r} (found {found})")
    try:
        whole = header.pop("sha256", None) == _checksum(tensors, header)
    except RecursionError as error:
        raise ValueError(f"the header of {path} is nested too deeply") from error
    if not whole:
        raise ValueError(f"{path} is damaged: its checksum does not match; compress the context again")
    return header, tensors


def _check(header: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raise ValueError, beginning with `where` and naming the field, unless header and tensors are a cache's."""

    def require(met: bool | torch.Tensor, field: str, wanted: str, found: Any) -> None:
        if not met:
            raise ValueError(f"{where}: {field} must be {wanted}, found {reprlib.repr(found)}")

    def same_names(found: set[str], wanted: set[str], field: str) -> None:
        if found != wanted:
            said = [
                *(f"{name} is missing" for name in wanted - found),
                *(f"{name!r} is new" for name in found - wanted),
            ]
            raise ValueError(f"{where}: of the {field} {', '.join(sorted(said)[:5])}")

    same_names(set(header), {"format", "positions", "fingerprint", "contexts", "layers", "state"}, "fields")
    state, count = field_of(header, "state", dict, where), field_of(header, "layers", int, where)
    same_names(set(state), set(_STATE_NUMBERS), "numbers of its state")
    require(header["positions"] in SCHEMES, "positions", f"one of {list(SCHEMES)}", header["positions"])
    mark = header["fingerprint"]
    require(mark is None or type(mark) is str, "fingerprint", "a digest of the model", mark)
    contexts = field_of(header, "contexts", list, where)
    try:
        for one in contexts:
            ContextRead.parse(one)
    except (TypeError, ValueError):
        require(False, "contexts", "digests of contexts", contexts)
    for name, kind in _STATE_NUMBERS.items():
        value = field_of(state, name, kind, where)
        require(0 <= value <= _MOST, name, f"between 0 and {_MOST}", value)

    require(0 < count <= len(tensors), "layers", "the number of its layers", count)
    rows = [f"layers.{index}.{name}" for index in range(count) for name in ("keys", "values")]
    same_names(set(tensors), {*rows, "read", *(f"state.{name}" for name in _STATE_TENSORS)}, "tensors")
    first = tensors[rows[0]]
    require(first.dim() == 4 and min(first.shape[1::2]) > 0, rows[0], "[B, Hkv, rows, D]", tuple(first.shape))
    samples = len(first)
    wanted = (samples, first.shape[1], state["gist_columns"] + state["tail_columns"], first.shape[3])
    for name in rows:
        require(tensors[name].shape == wanted, name, f"of shape {wanted}", tuple(tensors[name].shape))
        # compressed under autocast keys are wider than values
        alike = "layers.0." + name.rpartition(".")[2]
        require(tensors[name].dtype in _ROW_DTYPES, name, "numbers a model computes in", tensors[name].dtype)
        require(tensors[name].dtype == tensors[alike].dtype, name, f"{tensors[alike].dtype}", tensors[name].dtype)
        require(finite(tensors[name]), name, f"finite ({_OVERFLOW})", "inf or NaN")

    read = tensors["read"]
    require(read.dtype == torch.int32, "read", "torch.int32", read.dtype)
    require(read.shape in ((samples, 0), (samples, state["fed"])), "read", "the ids of fed columns", tuple(read.shape))
    require((read >= UNKNOWN).all(), "read", f"ids, {PADDING} or {UNKNOWN}", read.tolist())
    for name, columns in _STATE_TENSORS.items():
        tensor, shape = tensors[f"state.{name}"], (samples, state[columns]) if columns else (samples,)
        require(tensor.shape == shape, name, f"of shape {shape}", tuple(tensor.shape))
        dtypes = (torch.bool,) if columns else (torch.int64, torch.int32)
        require(tensor.dtype in dtypes, name, str(dtypes[0]), tensor.dtype)
        most = 1 if columns else _MOST
        numbers = tensor.view(torch.uint8) if columns else tensor  # the byte of a True is 1
        require(((numbers >= 0) & (numbers <= most)).all(), name, f"between 0 and {most}", numbers.tolist())
    seen, gist_rows, tail_rows, is_gist = (
        tensors[f"state.{name}"] for name in ("seen", "gist_rows", "tail_rows", "tail_is_gist")
    )
    for name, owned, columns in (("gist_rows", gist_rows, "gist_columns"), ("tail_rows", tail_rows, "tail_columns")):
        require((owned <= state[columns]).all(), name, f"at most the {state[columns]} {columns}", owned.tolist())
    # not at least gist_rows: a layout may keep a sink's row twice
    require((seen >= tail_rows + (gist_rows > 0)).all(), "seen", "the tokens that made its rows", seen.tolist())
    require((seen <= state["length"]).all(), "length", "at least what was seen", state["length"])
    column = torch.arange(state["tail_columns"])
    strange = is_gist & (column < state["tail_columns"] - tail_rows[:, None])
    require(not strange.any(), "tail_is_gist", "of rows that a sample owns", is_gist.tolist())
    require(state["tail_has_gists"] or not is_gist.any(), "tail_has_gists", "true where the tail has gists", False)


def finite(rows: torch.Tensor) -> bool:
    """Whether no number is inf or NaN. numpy's work, so that a forked child may ask (gistkern/corpus/rows.py)."""
    if not rows.is_floating_point():
        return True
    rows = rows.float() if rows.itemsize == 1 else rows
    whole, mask = _EXPONENT[rows.dtype]
    return not ((rows.view(whole).numpy() & mask) == mask).any()


def _checksum(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
