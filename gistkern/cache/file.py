"""A compressed context on disk: one safetensors file with its settings, checksum and model fingerprint.

Rows and a header, and nothing of the cache that they are of. A checksum says that a file is what somebody wrote, not
that it makes sense: `load` holds every number against the tensors before it gives them away.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from gistkern.cache.tokens_read import PADDING, UNKNOWN, ContextRead
from gistkern.files import field_of, parse_json, read_bytes, replacing
from gistkern.layout.positions import SCHEMES
from gistkern.rows import LARGEST, KeyValueRows

__all__ = ["FLOATS", "CacheFile", "check_device", "finite", "load", "save"]

_FORMAT, _FORMER = "gistkern-cache-2", "gistkern-cache-1"
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
_SCALES = ("gist_key_scale", "gist_value_scale")
_OVERFLOW = "the model overflowed, compute in bfloat16 or float32"
_MOST = 2**31 - 1  # positions and columns are int32 in a layout
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that models compute in
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


# a number is inf or NaN where all bits of its exponent are set
_EXPONENT = {
    torch.float64: (torch.int64, 0x7FF0 << 48),
    torch.float32: (torch.int32, 0x7F80 << 16),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


@dataclass(frozen=True)
class CacheFile:
    """What a file holds.

    `cuts` are digests of the raw rows that are kept elsewhere, one for each sample, or none.
    `dtype` is what the model computes in; a layer is its gist rows ``[B, Hkv, G, D]``, perhaps quantized, and its tail
    rows ``[B, Hkv, T, D]``; `read` the ids that were read after the context, int64 ``[B, columns]``; `state` the fields
    of a CacheState.
    """

    positions: str | None
    fingerprint: str | None
    contexts: Sequence[str]
    dtype: torch.dtype
    state: Mapping[str, Any]
    read: torch.Tensor
    layers: Sequence[tuple[KeyValueRows, KeyValueRows]]
    cuts: Sequence[str] = ()


def save(found: CacheFile, path: str | os.PathLike) -> None:
    """Write a file, replacing it in one step; a warning where it holds what `load` refuses."""
    # clones: counts that are equal may be one tensor, which safetensors refuses
    tensors = {f"state.{name}": found.state[name].clone() for name in _STATE_TENSORS}
    tensors["read"] = found.read.int()
    for index, (gist, tail) in enumerate(found.layers):
        rows = {**_named("gist", gist), **_named("tail", tail)}
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in rows.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header: dict[str, Any] = {
        "format": _FORMAT,
        "positions": found.positions,
        "fingerprint": found.fingerprint,
        "contexts": list(found.contexts),
        "dtype": str(found.dtype).removeprefix("torch."),
        "layers": len(found.layers),
        "state": {name: found.state[name] for name in _STATE_NUMBERS},
        **({"cuts": list(found.cuts)} if found.cuts else {}),
    }
    for name, tensor in tensors.items():
        if name.startswith("layers.") and not finite(tensor):
            warnings.warn(f"{name} holds inf or NaN, which GistCache.load refuses: {_OVERFLOW}", stacklevel=3)
            break
    header["sha256"] = _checksum(tensors, header)
    with replacing(path) as draft:
        safetensors.save_file(tensors, draft, metadata={"gistkern": json.dumps(header)})


def _named(buffer: str, rows: KeyValueRows) -> dict[str, torch.Tensor]:
    return {f"{buffer}_{name}": tensor for name, tensor in vars(rows).items() if tensor is not None}


def load(path: str | os.PathLike) -> CacheFile:
    """Read a file on the CPU. ValueError, naming file and field, if it is torn, foreign or makes no sense."""
    header, tensors = _read(path)
    _check(header, tensors, f"{path} was not written by GistCache.save")
    state: dict[str, Any] = {
        name: tensors[f"state.{name}"].to(torch.bool if columns else torch.int64)
        for name, columns in _STATE_TENSORS.items()
    }

    def rows(index: int, buffer: str) -> KeyValueRows:
        names = (f"layers.{index}.{buffer}_{name}" for name in ("key", "value", "key_scale", "value_scale"))
        return KeyValueRows(*(tensors.get(name) for name in names))  # type: ignore[arg-type]

    return CacheFile(
        **{name: header[name] for name in ("positions", "fingerprint", "contexts")},
        dtype=_NAMES[header["dtype"]],
        state={**state, **header["state"]},
        read=tensors["read"].to(torch.int64),
        layers=[(rows(index, "gist"), rows(index, "tail")) for index in range(header["layers"])],
        cuts=header.get("cuts", ()),
    )


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
    if header.get("format") == _FORMER:
        raise ValueError(
            f"{path} is of format {_FORMER!r}, which this version does not read: compress the context again"
        )
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

    same_names(
        set(header) - {"cuts"}, {"format", "positions", "fingerprint", "contexts", "dtype", "layers", "state"}, "fields"
    )
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

    dtype = header["dtype"]
    require(type(dtype) is str and dtype in _NAMES, "dtype", f"one of {list(_NAMES)}", dtype)
    require(0 < count <= len(tensors), "layers", "the number of its layers", count)
    first = tensors.get("layers.0.gist_key")
    if first is None:
        raise ValueError(f"{where}: of the tensors layers.0.gist_key is missing")
    quantized = first.dtype in LARGEST
    parts = ["gist_key", "gist_value", "tail_key", "tail_value", *(_SCALES if quantized else ())]
    names = {f"layers.{index}.{part}": part for index in range(count) for part in parts}
    same_names(set(tensors), {*names, "read", *(f"state.{name}" for name in _STATE_TENSORS)}, "tensors")
    require(
        first.dim() == 4 and min(first.shape[1::2]) > 0, "layers.0.gist_key", "[B, Hkv, rows, D]", tuple(first.shape)
    )
    samples = len(first)
    cuts = header.get("cuts")
    told = type(cuts) is list and len(cuts) == samples and all(type(cut) is str for cut in cuts)
    require(cuts is None or told, "cuts", f"digests of the raw rows of {samples} samples", cuts)
    for name, part in names.items():
        tensor, columns = tensors[name], state[f"{part[:4]}_columns"]
        wanted: tuple[int, ...] = (samples, first.shape[1], columns, first.shape[3])[: 3 if part in _SCALES else 4]
        require(tensor.shape == wanted, name, f"of shape {wanted}", tuple(tensor.shape))
        alike = tensors[f"layers.0.{part[:4]}_key"].dtype
        held = {torch.float32} if part in _SCALES else {*FLOATS, *LARGEST} if part[:4] == "gist" else {*FLOATS}
        require(tensor.dtype in held, name, "numbers a model computes in", tensor.dtype)
        require(part in _SCALES or tensor.dtype == alike, name, f"{alike}", tensor.dtype)
        require(finite(tensor), name, f"finite ({_OVERFLOW})", "inf or NaN")
        require(part not in _SCALES or (tensor >= 0).all(), name, "no scale below 0", tensor)

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
