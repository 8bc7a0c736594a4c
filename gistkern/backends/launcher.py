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
    taken = _taken(kernel, tuple(kernel.src.signature.values()))
    if len(taken.arguments) != len(values):
        raise ValueError(f"{kernel.metadata.name} takes {len(taken.arguments)} arguments, got {len(values)}")
    given: list[Any] = []
    _flatten(taken.arguments, values, given)
    packed = _Packed(slots)
    for parameter, value in zip(taken.parameters, given, strict=True):
        parameter.pack(packed, value)
    metadata = kernel.metadata
    warps, cluster, shared = kernel.packed_metadata[:3]
    header = [kernel.function, *grid, warps, shared, cluster]
    header += [int(metadata.launch_pdl), int(metadata.launch_cooperative_grid)]
    tensors = packed.tensors if slots is None else len(slots)
    entries = (*packed.entries, _NUMBER, 0, _NUMBER, 0)  # no scratch memory, neither global nor of a profiler
    return [*header, tensors, packed.parameters + 2, *entries]


class _Packed:
    """Entries of csrc/launcher.h, and how many parameters and tensors they are."""

    __slots__ = ("entries", "parameters", "slots", "tensors")

    def __init__(self, slots: dict[int, int] | None) -> None:
        self.entries: list[int] = []
        self.parameters = self.tensors = 0
        self.slots = slots

    def number_of(self, tensor: Any) -> int:
        """Of a tensor among those of the launch."""
        self.tensors += 1
        return self.tensors - 1 if self.slots is None else self.slots[id(tensor)]


class _Integer:
    """Of `bits` that hold values from `low` to below `high`."""

    def __init__(self, kind: str) -> None:
        size = _INTEGERS[kind]
        self.kind, self.sizes = kind, [size]
        half, signed = 256**size // 2, kind[0] != "u"
        self.low: int = -half if signed else 0
        self.high: int = half if signed else 2 * half
        if kind in ("i1", "u1"):
            self.low, self.high = 0, 2

    def pack(self, packed: _Packed, value: int) -> None:
        """Its low bytes are those of the parameter."""
        value = int(value)
        if not self.low <= value < self.high:
            raise ValueError(f"{value} is no {self.kind}")
        packed.entries += (_NUMBER, value if value < 2**63 else value - 2**64)
        packed.parameters += 1


class _Float:
    def __init__(self, kind: str) -> None:
        self.format = _FLOATS[kind]
        self.sizes = [struct.calcsize(self.format)]

    def pack(self, packed: _Packed, value: float) -> None:
        """Its bits."""
        data = struct.pack(self.format, value)
        packed.entries += (_NUMBER, int.from_bytes(data, "little", signed=len(data) == 8))
        packed.parameters += 1


class _Pointer:
    """To a tensor, or none."""

    sizes = (_POINTER_BYTES,)

    def __init__(self, kind: str, alignment: int) -> None:
        self.element, self.alignment = _element(kind), alignment

    def pack(self, packed: _Packed, value: Any) -> None:
        """Which tensor it is."""
        if value is None:
            packed.entries += (_NUMBER, 0)
        else:
            packed.entries += (_POINTER, packed.number_of(value), self.element, self.alignment)
        packed.parameters += 1


class _Descriptor:
    """A tensor map, followed by its shape and strides as Triton passes them."""

    def __init__(self, kind: str, made: dict[str, Any] | None) -> None:
        if made is None or made["fp4_padded"]:
            raise ValueError("a prepared launch takes tensor descriptors that become tensor maps, and none of fp4")
        self.element, self.box, self.swizzle = _element(kind), made["block_size"], made["swizzle"]
        self.type = _DRIVER_TYPES.get(made["elem_type"], made["elem_type"])
        self.shape, self.strides = _Integer("i32"), _Integer("i64")
        rank = len(self.box)
        self.sizes = [_MAP_BYTES, *self.shape.sizes * rank, *self.strides.sizes * rank]

    def pack(self, packed: _Packed, value: Any) -> None:
        """All that it is made from."""
        kind = _TF32 if getattr(value, "round_f32_to_tf32", False) else self.type
        head = (_MAP, packed.number_of(value.base), self.element, kind, self.swizzle, int(value.padding == "nan"))
        packed.entries += (*head, len(value.shape), *value.shape, *value.strides, *self.box)
        packed.parameters += 1
        for parameter, numbers in ((self.shape, value.shape), (self.strides, value.strides)):
            for number in numbers:
                parameter.pack(packed, number)


class _Taken(NamedTuple):
    """What a kernel takes: its arguments, of which None are constants, in tuples as they come; and those in a row."""

    arguments: tuple[Any, ...]
    parameters: tuple[Any, ...]


@lru_cache(maxsize=1024)
def _taken(kernel: Any, signature: tuple[Any, ...]) -> _Taken:
    metadata = kernel.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{metadata.name} needs scratch memory, which a prepared launch does not give")
    attributes = {path: dict(pairs) for path, pairs in kernel.src.attrs.items()}
    maps, parameters = iter(getattr(metadata, "tensordesc_meta", None) or ()), []

    def arguments(kinds: Sequence[Any], path: tuple[int, ...]) -> tuple[Any, ...]:
        found: list[Any] = []
        for index, kind in enumerate(kinds):
            if isinstance(kind, tuple):
                found.append(arguments(kind, (*path, index)))
                continue
            found.append(None if kind == "constexpr" else kind)
            if kind != "constexpr":
                alignment = attributes.get((*path, index), {}).get("tt.divisibility", 1)
                parameters.append(_parameter(kind, alignment, maps))
        return tuple(found)

    taken = _Taken(arguments(signature, ()), tuple(parameters))
    # a dropped or misplaced parameter would be read as another; behind them stand two addresses of scratch memory
    made = [size for parameter in parameters for size in parameter.sizes] + 2 * [_POINTER_BYTES]
    sizes = [parameter.size for parameter in kernel_parameters(kernel.asm["cubin"], metadata.name)]
    if sizes != made:
        raise RuntimeError(f"{metadata.name} takes parameters of {sizes} bytes, its arguments make {made}")
    kernel.run  # noqa: B018 (Triton loads a kernel where this is first asked for)
    return taken


def _parameter(kind: str, alignment: int, maps: Iterator[dict[str, Any]]) -> Any:
    if kind.startswith("tensordesc"):
        return _Descriptor(kind[len("tensordesc<") : kind.index("[")], next(maps, None))
    if kind.startswith("*"):
        return _Pointer(kind[1:], alignment)
    if kind in _FLOATS:
        return _Float(kind)
    if kind in _INTEGERS:
        return _Integer(kind)
    raise ValueError(f"a prepared launch takes no {kind}")


def _flatten(kinds: tuple[Any, ...], values: Sequence[Any], found: list[Any]) -> None:
    """Append the values that are parameters, of arguments of these kinds."""
    for kind, value in zip(kinds, values, strict=True):
        if kind.__class__ is tuple:
            _flatten(kind, value, found)
        elif kind is not None:
            found.append(value)


def _element(kind: str) -> int:
    if kind not in _ELEMENTS:
        raise ValueError(f"a prepared launch takes no tensor of {kind}")
    return _ELEMENTS[kind]


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
