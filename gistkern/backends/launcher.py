"""Prepared launches of Triton's kernels: what stays the same is described once, a call brings its tensors.

Triton's own launcher makes a tensor map (what TMA copies through) from Python objects, at every launch anew. Here the
extension's operator `launch` makes it (csrc/launcher.h), and calls the driver on the handle that Triton loaded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from gistkern.backends import native
from gistkern.kernels.device import emulated

__all__ = ["Parameter", "PreparedLaunch", "describe", "kernel_parameters", "prepare"]

# of csrc/launcher.h
_NUMBER, _POINTER, _MAP = 0, 1, 2
# Triton's names of element types: torch's ScalarType
_ELEMENTS = {
    **{"u8": 0, "i8": 1, "i16": 2, "i32": 3, "i64": 4, "fp16": 5, "fp32": 6, "fp64": 7, "i1": 11, "bf16": 15},
    **{"fp8e5": 23, "fp8e4nv": 24},
}
_INTEGERS = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d"}
# Triton numbers a map's element types as its device code does; the driver's numbers of those that differ
_DRIVER_TYPES = {8: 10, 9: 8, 10: 9}
_TF32 = 11
_POINTER_BYTES, _MAP_BYTES = 8, 128


class Parameter(NamedTuple):
    """Where a kernel reads a parameter, in bytes from the first."""

    offset: int
    size: int


class PreparedLaunch:
    """A launch that takes tensors alone: `prepare` makes it.

    Parameters
    ----------
    description : torch.Tensor
        int64 on the CPU, as csrc/launcher.h says.
    kernel : object
        Kept, so that the driver keeps the code that the description points to.
    """

    __slots__ = ("_launch", "description", "emulated", "kernel")

    def __init__(self, description: torch.Tensor, kernel: Any) -> None:
        self.description, self.kernel, self.emulated = description, kernel, emulated()
        self._launch = native.operators().launch.default

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream of the tensors' device, with these in the order of the kernel's arguments.

        Raises
        ------
        RuntimeError
            If a tensor is not what the kernel was compiled for: count, device, element type, alignment, or a tensor
            map that reaches past its end; or the driver's error, by its name. Nothing has been launched then.
        """
        self._launch(self.description, tensors, self.emulated)


def prepare(kernel: Any, grid: tuple[int, int, int], values: Sequence[Any]) -> PreparedLaunch:
    """Prepare launches of a compiled kernel.

    Parameters
    ----------
    kernel : triton.compiler.CompiledKernel
        What ``function[grid](...)`` and ``function.warmup(...)`` return.
    grid : tuple of int
        Programs in three dimensions.
    values : sequence
        The kernel's arguments in order, constants included, as Triton takes them: numbers, tensors, None, tuples, and
        tensor descriptors. Of tensors only which arguments they are matters: `PreparedLaunch` is given others later.

    Raises
    ------
    RuntimeError
        If there is no extension, or the kernel takes other parameters than Triton's versions known here make it take.
    ValueError
        If an argument is not of its type, or the kernel needs what only Triton's own launcher gives.
    """
    return PreparedLaunch(torch.tensor(describe(kernel, grid, values), dtype=torch.int64), kernel)


def describe(
    kernel: Any, grid: tuple[int, int, int], values: Sequence[Any], slots: dict[int, int] | None = None
) -> list[int]:
    """What csrc/launcher.h calls the description of such a launch; arguments and errors as those of `prepare`.

    `slots` numbers the tensors (or the bases of descriptors) by their `id`; otherwise they are numbered as they come.
    """
    metadata = kernel.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{metadata.name} needs scratch memory, which a prepared launch does not give")
    packed = _Packed(iter(getattr(metadata, "tensordesc_meta", None) or ()), slots)
    signature = list(kernel.src.signature.values())
    if len(signature) != len(values):
        raise ValueError(f"{metadata.name} takes {len(signature)} arguments, got {len(values)}")
    attributes = {path: dict(pairs) for path, pairs in kernel.src.attrs.items()}
    for index, (kind, value) in enumerate(zip(signature, values, strict=True)):
        packed.add(kind, value, (index,), attributes)
    for _ in ("global scratch", "profile scratch"):
        packed.number("i64", 0)
    # a dropped or misplaced parameter would be read as another
    taken = _sizes(kernel.asm["cubin"], metadata.name)
    if taken != packed.sizes:
        raise RuntimeError(f"{metadata.name} takes parameters of {taken} bytes, its arguments make {packed.sizes}")
    kernel.run  # noqa: B018 (Triton loads a kernel where this is first asked for)
    warps, cluster, shared = kernel.packed_metadata[:3]
    header = [kernel.function, *grid, warps, shared, cluster]
    header += [int(metadata.launch_pdl), int(metadata.launch_cooperative_grid)]
    return [*header, packed.tensors if slots is None else len(slots), len(packed.sizes), *packed.entries]


class _Packed:
    """Entries of csrc/launcher.h, and the bytes of each."""

    def __init__(self, maps: Iterator[dict[str, Any]], slots: dict[int, int] | None) -> None:
        self.entries: list[int] = []
        self.sizes: list[int] = []
        self.tensors = 0
        self._maps, self._slots = maps, slots

    def add(self, kind: Any, value: Any, path: tuple[int, ...], attributes: dict[tuple[int, ...], dict]) -> None:
        """An argument, of Triton's type `kind`."""
        if isinstance(kind, tuple):
            for index, (part, inner) in enumerate(zip(kind, value, strict=True)):
                self.add(part, inner, (*path, index), attributes)
        elif kind == "constexpr":
            return
        elif kind.startswith("tensordesc"):
            self.descriptor(kind, value)
        elif kind.startswith("*"):
            self.pointer(kind[1:], value, attributes.get(path, {}).get("tt.divisibility", 1))
        else:
            self.number(kind, value)

    def number(self, kind: str, value: int | float) -> None:
        """An integer or a float."""
        if kind in _FLOATS:
            data = struct.pack(_FLOATS[kind], value)
        elif kind in _INTEGERS:
            size, value = _INTEGERS[kind], int(value)
            low, high = (0, 256**size) if kind[0] == "u" else (-(256**size) // 2, 256**size // 2)
            if kind in ("i1", "u1"):
                low, high = 0, 2
            if not low <= value < high:
                raise ValueError(f"{value} is no {kind}")
            data = value.to_bytes(size, "little", signed=low < 0)
        else:
            raise ValueError(f"a prepared launch takes no {kind}")
        self._append(len(data), _NUMBER, int.from_bytes(data.ljust(8, b"\0"), "little", signed=True))

    def pointer(self, kind: str, value: Any, alignment: int) -> None:
        """A tensor, or none."""
        if value is None:
            self.number("i64", 0)
        else:
            self._append(_POINTER_BYTES, _POINTER, self._number(value), _element(kind), alignment)

    def descriptor(self, kind: str, value: Any) -> None:
        """A tensor map, followed by its shape and strides as Triton passes them."""
        made = next(self._maps, None)
        if made is None or made["fp4_padded"]:
            raise ValueError("a prepared launch takes tensor descriptors that become tensor maps, and none of fp4")
        shape, strides = list(value.shape), list(value.strides)
        map_type = _DRIVER_TYPES.get(made["elem_type"], made["elem_type"])
        if getattr(value, "round_f32_to_tf32", False):
            map_type = _TF32
        element = _element(kind[len("tensordesc<") : kind.index("[")])
        head = (self._number(value.base), element, map_type, made["swizzle"], int(value.padding == "nan"))
        self._append(_MAP_BYTES, _MAP, *head, len(shape), *shape, *strides, *made["block_size"])
        for kind, numbers in (("i32", shape), ("i64", strides)):
            for number in numbers:
                self.number(kind, number)

    def _number(self, tensor: Any) -> int:
        self.tensors += 1
        return self.tensors - 1 if self._slots is None else self._slots[id(tensor)]

    def _append(self, size: int, *entry: int) -> None:
        self.sizes.append(size)
        self.entries += entry


def _element(kind: str) -> int:
    if kind not in _ELEMENTS:
        raise ValueError(f"a prepared launch takes no tensor of {kind}")
    return _ELEMENTS[kind]


@lru_cache(maxsize=1024)
def _sizes(cubin: bytes, name: str) -> list[int]:
    return [parameter.size for parameter in kernel_parameters(cubin, name)]


def kernel_parameters(cubin: bytes, name: str) -> list[Parameter]:
    """The parameters that a kernel takes, in order, as its cubin says in the section ``.nv.info.NAME``."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    wanted, text = f".nv.info.{name}\0".encode(), sections[names][4]
    found: dict[int, Parameter] = {}
    for title, _, _, _, at, length in sections:
        if not cubin.startswith(wanted, text + title):
            continue
        end = at + length
        while at < end:  # attributes: format, number, and a value or the size of what follows
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if (form, attribute) == (4, 0x17):  # EIATTR_KPARAM_INFO: ..., ordinal, offset, size above 18 other bits
                _, ordinal, offset, bits = struct.unpack_from("<IHHI", cubin, at)
                found[ordinal] = Parameter(offset, bits >> 18)
            at += value if form == 4 else 0
    return [found[ordinal] for ordinal in range(len(found))]
