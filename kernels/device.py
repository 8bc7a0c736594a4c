"""What launches need to know about the device of a tensor: its architecture, multiprocessors and L2 cache."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from gistkern.kernels.chips import Chip, chip_for

__all__ = ["DeviceFacts", "emulated", "facts_of", "guard"]

# launches run on CPU tensors under an emulator (Triton's interpreter, ttsem): they then take this chip's choices
EMULATED_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class DeviceFacts:
    """Architecture (``sm_90``, ``gfx942``), multiprocessors, L2 bytes and name of one device."""

    arch: str
    multiprocessors: int
    l2_bytes: int
    name: str


def emulated() -> bool:
    """Whether an emulator executes kernel launches, so that they take CPU tensors (``GISTKERN_EMULATED=1``)."""
    return os.environ.get("GISTKERN_EMULATED") == "1"


def facts_of(device: torch.device) -> DeviceFacts:
    """The facts of a CUDA or ROCm device; under an emulator, those of the chip it stands for."""
    if emulated():
        return _of_chip(EMULATED_CAPABILITY)
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _of_chip(capability: tuple[int, int]) -> DeviceFacts:
    chip: Chip | None = chip_for(capability)
    assert chip is not None
    return DeviceFacts(chip.arch, chip.multiprocessors, chip.l2_bytes, chip.example)


@cache
def _of_index(index: int) -> DeviceFacts:
    found = torch.cuda.get_device_properties(index)
    arch = f"sm_{found.major}{found.minor}"
    if torch.version.hip is not None:
        arch = found.gcnArchName.split(":")[0]
    return DeviceFacts(arch, found.multi_processor_count, found.L2_cache_size, found.name)


def guard(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make it this one."""
    return nullcontext() if emulated() else torch.cuda.device(device)
