"""What launches need to know about the device of a tensor: its architecture, multiprocessors and L2 cache."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from gistkern.kernels.chips import chip_named

__all__ = ["DeviceFacts", "emulated", "facts_of", "guard", "products_precision", "wide_rows", "wide_samples"]

# launches run on CPU tensors under an emulator (Triton's interpreter, ttsem): they then take this chip's choices
EMULATED_ARCH = "sm_90"


@dataclass(frozen=True)
class DeviceFacts:
    """Architecture (``sm_90``, ``gfx942``), multiprocessors, L2 bytes and name of one device."""

    arch: str
    multiprocessors: int
    l2_bytes: int
    name: str

    @property
    def amd(self) -> bool:
        """Whether it is a ROCm device."""
        return self.arch.startswith("gfx")


def emulated() -> bool:
    """Whether an emulator executes kernel launches, so that they take CPU tensors (``GISTKERN_EMULATED=1``)."""
    return os.environ.get("GISTKERN_EMULATED") == "1"


def facts_of(device: torch.device) -> DeviceFacts:
    """The facts of a CUDA or ROCm device; under an emulator, those of the chip it stands for."""
    if emulated():
        return _of_chip(EMULATED_ARCH)
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _of_chip(arch: str) -> DeviceFacts:
    chip = chip_named(arch)
    return DeviceFacts(chip.arch, chip.multiprocessors, chip.l2_bytes, chip.example)


@cache
def _of_index(index: int) -> DeviceFacts:
    found = torch.cuda.get_device_properties(index)
    arch = f"sm_{found.major}{found.minor}"
    if torch.version.hip is not None:
        arch = found.gcnArchName.split(":")[0]
    return DeviceFacts(arch, found.multi_processor_count, found.L2_cache_size, found.name)


def wide_rows(k: torch.Tensor, v: torch.Tensor, gist_k: torch.Tensor, gist_v: torch.Tensor) -> bool:
    """Whether a row offset within one head of k, v, gist_k, gist_v (``[B, H, R, D]``) can pass int32.

    The kernels number local and gist rows in one sequence, so the rows of both count.
    """
    rows = k.shape[2] + gist_k.shape[2]
    return rows * max(abs(buffer.stride(2)) for buffer in (k, v, gist_k, gist_v)) >= 2**31


def wide_samples(*tensors: torch.Tensor) -> bool:
    """Whether an offset within one sample of these ``[B, H, N, D]`` tensors can pass int32."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31
        or t.shape[1] * t.shape[2] >= 2**31
        for t in tensors
    )


def guard(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make it this one."""
    return nullcontext() if emulated() else torch.cuda.device(device)


def products_precision(device: torch.device) -> str:
    """How fp32 products are computed: as the user set torch (`torch.backends.cuda.matmul.fp32_precision`) by now.

    A call's backward follows the setting at its own time. Of AMD's chips only gfx942 has tf32.
    """
    if torch.version.hip is not None and facts_of(device).arch != "gfx942":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
