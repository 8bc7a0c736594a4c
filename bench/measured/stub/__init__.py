"""A stub device: Triton's real launch path (binder, cache, launcher in C) over a driver that runs nothing.

    stub.activate()          # before gistkern and before Triton's driver is asked for
    ...                      # calls on CPU tensors compile for the chip and launch
    stub.launches()          # how many launches the driver has seen

Counts of calls and launches are those of a GPU. Times leave out the driver's own work and the CUDA allocator.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["Launch", "activate", "active", "fail_next", "grid", "last", "launches", "record"]

FOLDER = Path(__file__).resolve().parents[3] / "build" / "stub"
_state: _Record | None = None


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        *(("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared_bytes", ctypes.c_uint32)),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("num_attributes", ctypes.c_uint32)),
    )


class _Record(ctypes.Structure):
    """As in driver.c."""

    _fields_ = (
        *(("launches", ctypes.c_int64), ("num_parameters", ctypes.c_int32), ("fail", ctypes.c_int32)),
        *(("sizes", ctypes.c_int32 * 256), ("config", _Config), ("attributes", _Attribute * 8)),
        *(("function", ctypes.c_void_p), ("recorded", ctypes.c_void_p), ("parameters", ctypes.c_uint8 * 32768)),
    )


class Launch(NamedTuple):
    """What the driver was given. `parameters` are those of the function that `record` was told of."""

    name: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    attributes: dict[int, int]  # number of a CUlaunchAttribute, its value's first word
    parameters: list[bytes]


def activate(arch: int = 90) -> None:
    """Make the stub the CUDA driver of this process and a chip of `arch` Triton's device.

    RuntimeError if gistkern has been imported before without ``GISTKERN_EMULATED``, or Triton's driver is in use.
    """
    global _state
    if "gistkern" in sys.modules and os.environ.get("GISTKERN_EMULATED") != "1":
        raise RuntimeError("activate the stub before gistkern is imported")
    os.environ |= {"TRITON_LIBCUDA_PATH": str(FOLDER), "GISTKERN_EMULATED": "1"}
    library = ctypes.CDLL(str(_build()), mode=ctypes.RTLD_GLOBAL)  # found by its name from here on
    _state = _Record.in_dll(library, "stub_record")

    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class StubDriver(CudaDriver):
        def __init__(self):
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: divmod(arch, 10)
            self.set_current_device = lambda device: None

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

    driver.set_active(StubDriver())


def active() -> bool:
    """Whether it is the driver of this process."""
    return _state is not None


def _build() -> Path:
    source, library = Path(__file__).with_name("driver.c"), FOLDER / "libcuda.so.1"
    if not library.is_file() or library.stat().st_mtime < source.stat().st_mtime:
        FOLDER.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        flags = ("-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1")
        subprocess.run([os.environ.get("CC", "gcc"), *flags, source, "-o", partial], check=True)
        partial.replace(library)
    return library


def _record() -> _Record:
    if _state is None:
        raise RuntimeError("the stub is not active")
    return _state


def launches() -> int:
    """How many kernels have been launched in this process."""
    return _record().launches


def record(function: int, sizes: list[int]) -> None:
    """From now on keep the parameters of this function's launches; they have these sizes in bytes."""
    state = _record()
    if len(sizes) > len(state.sizes) or sum(sizes) > len(state.parameters):
        raise ValueError(f"the stub keeps at most {len(state.sizes)} parameters of {len(state.parameters)} bytes")
    state.recorded, state.num_parameters = function, len(sizes)
    state.sizes[: len(sizes)] = sizes


def last() -> Launch:
    """The last launch."""
    state = _record()
    if not state.launches:
        raise RuntimeError("nothing has been launched")
    config, packed, parts, at = state.config, bytes(state.parameters), [], 0
    for size in state.sizes[: state.num_parameters] if state.recorded == state.function else ():
        parts.append(packed[at : at + size])
        at += size
    attributes = {item.id: item.value[0] for item in state.attributes[: config.num_attributes]}
    name = ctypes.string_at(state.function).decode()
    return Launch(
        *(name, state.function, tuple(config.grid), tuple(config.block), config.shared_bytes),
        *(config.stream or 0, attributes, parts),
    )


def grid() -> tuple[int, ...]:
    """The last launch's grid."""
    return last().grid


def fail_next(code: int) -> None:
    """Let the next launch, or the next tensor map, be refused with this error code."""
    _record().fail = code
