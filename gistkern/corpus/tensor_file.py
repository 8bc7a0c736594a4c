"""Tensors of a safetensors file, read piece by piece at their offsets.

Not through safetensors' own reader, which maps the file: a process dies where somebody cuts a mapped file. What is
read here has no place in the file either, so threads and forked children share it without a lock.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gistkern.files import UnreadableError, field_of, parse_json

__all__ = ["TensorFile"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


class TensorFile:
    """An open safetensors file.

    Parameters
    ----------
    path : Path
        The file.

    Attributes
    ----------
    metadata : dict of str to str
        What stands in it besides.
    shapes, dtypes : dict
        By tensor.

    Raises
    ------
    ValueError
        If the file cannot be read, or is torn or another one; the two are told apart.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place is not waited for
        except OSError as error:
            raise UnreadableError(path, error) from error
        weakref.finalize(self, os.close, handle)
        self._handle = handle
        size = os.fstat(handle).st_size
        self._begin = 8 + int.from_bytes(self._read(0, min(8, size)), "little")
        if not 10 <= self._begin <= size:
            raise self._torn("its header is not all there")
        header = parse_json(bytes(self._read(8, self._begin - 8)), f"{path} is torn or no safetensors file: its header")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict):
            raise self._torn("its header is none")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._offsets: dict[str, int] = {}
        ends = {}
        for name, entry in header.items():
            ends[name] = self._add(name, entry)
        wanted = self._begin + max(ends.values(), default=0)
        if size != wanted:
            raise self._torn(f"it has {size} bytes, its header speaks of {wanted}")

    def _add(self, name: str, entry: Any) -> int:
        if not isinstance(entry, Mapping):
            raise self._torn(f"of {name} no shape is known")
        where = f"{self.path} is torn or no safetensors file: {name}"
        dtype, shape, offsets = (
            field_of(dict(entry), field, kind, where)
            for field, kind in (("dtype", str), ("shape", list), ("data_offsets", list))
        )
        if any(type(one) is not int or one < 0 for one in (*shape, *offsets)) or len(offsets) != 2:
            raise self._torn(f"{name} has a shape or place that is no list of counts")
        if math.prod(max(1, one) for one in shape) >= 2**48:  # more than torch counts, of an empty tensor too
            raise self._torn(f"{name} has the shape {shape}, which no file holds")
        self.shapes[name], self._offsets[name] = tuple(shape), offsets[0]
        if dtype in _DTYPES:
            self.dtypes[name] = _DTYPES[dtype]
            if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
                raise self._torn(f"{name} has other bytes than its shape {shape} takes")
        return int(offsets[1])

    def require(self, names: set[str]) -> None:
        """Raise ValueError unless it holds the tensors `names` and no others."""
        if set(self.shapes) != names:
            raise self._torn(f"it holds {sorted(self.shapes)}, expected {sorted(names)}")
        if other := names - set(self.dtypes):
            raise self._torn(f"{sorted(other)} are of no dtype of {list(_DTYPES)}")

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self._tensor(name, 0, self.shapes[name])

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows ``begin .. end - 1`` of a tensor, which must lie in it."""
        shape = self.shapes[name]
        if not 0 <= begin <= end <= shape[0]:
            raise ValueError(f"{self.path}: rows {begin} to {end} of {name} lie outside its {shape[0]}")
        return self._tensor(name, begin * math.prod(shape[1:]), (end - begin, *shape[1:]))

    def _tensor(self, name: str, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = self.dtypes[name]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        offset = self._begin + self._offsets[name] + first * dtype.itemsize
        return torch.frombuffer(self._read(offset, math.prod(shape) * dtype.itemsize), dtype=dtype).reshape(shape)

    def _read(self, offset: int, count: int) -> bytearray:
        found = bytearray(count)
        done = 0
        while done < count:
            try:
                got = os.pread(self._handle, count - done, offset + done)
            except OSError as error:
                raise UnreadableError(self.path, error) from error
            if not got:
                raise self._torn("it ended while it was read")
            found[done : done + len(got)] = got
            done += len(got)
        return found

    def _torn(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is torn or no safetensors file ({why})")
