"""Versions, devices, what each backend can do here, and the verdict on them. ``gistkern doctor`` prints it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

import gistkern
from gistkern import backends
from gistkern.backends import native
from gistkern.kernels.chips import chip_for
from gistkern.kernels.tuned import ENVIRONMENT

__all__ = ["report"]

_PACKAGES = ("torch", "transformers", "safetensors", "triton", "peft", "bitsandbytes", "accelerate", "flash-attn")

# the oldest and the newest version that the suite's core was run with: tests/compat, `make compat`
_TESTED = {
    "torch": ("2.9.1", "2.14.1"),
    "transformers": ("5.6.0", "5.24.0"),
    "safetensors": ("0.6.2", "0.8.0"),
    "peft": ("0.18.0", "0.21.2"),
    "accelerate": ("1.10.0", "1.15.0"),
}


def report() -> dict[str, Any]:
    """The environment as plain data (what ``--json`` prints)."""
    facts: dict[str, Any] = {
        "gistkern": gistkern.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "tested": {name: _tested(name, *versions) for name, versions in _TESTED.items()},
        "devices": _devices(),
        "extension": _extension(),
        "tuned_configs": os.environ.get(ENVIRONMENT),
        "backends": [_backend(row, device) for device in _device_names() for row in backends.BACKENDS],
    }
    return facts | {"verdict": _verdict(facts)}


def _extension() -> dict[str, Any]:
    reason = native.missing()
    facts: dict[str, Any] = {"loaded": reason is None, "reason": reason, "file": native.library_path().name}
    if reason is None:
        facts |= {"instruction_set": native.instruction_set(), "cuda_archs": native.cuda_archs() or None}
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tested(package: str, oldest: str, newest: str) -> dict[str, Any]:
    """The tested range, and whether the installed version lies in it (None: not installed)."""
    installed = _version(package)
    within = None
    if installed is not None:
        # a later patch of the newest minor version is no other version
        found, last = Version(installed), Version(newest)
        within = Version(oldest) <= found and found.release[:2] <= last.release[:2]
    return {"oldest": oldest, "newest": newest, "within": within}


def _device_names() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        chip = chip_for((properties.major, properties.minor))
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory": properties.total_memory,
                "listed": chip is not None,
            }
        )
    return devices


def _backend(row: backends.Backend, device: str) -> dict[str, Any]:
    # each serves some dtype and some layout, or says of the first why not
    tried = [row.reason(torch.empty(0, device=device, dtype=t), plain=True) for t in (torch.float32, torch.bfloat16)]
    reason = tried[0] if all(tried) else None
    return {"name": row.name, "device": device, "usable": reason is None, "reason": reason, "what": row.what}


def _verdict(facts: dict[str, Any]) -> dict[str, Any]:
    """What serves calls, what is broken, what is missing and how it is installed, which versions nobody tried."""
    gpu = "cuda" in _device_names()
    serving = {device: _serving(facts["backends"], device) for device in ("cpu", "cuda")}
    older: list[str] = []
    untested: list[str] = []
    for name, tested in facts["tested"].items():
        if tested["within"] is False:
            found = f"{name} {facts['packages'][name]} (tested: {tested['oldest']} to {tested['newest']})"
            (older if Version(facts["packages"][name]) < Version(tested["oldest"]) else untested).append(found)
    broken = [f"{found}: gistkern needs a newer one" for found in older]
    if native.is_broken():
        broken.append(f"the compiled extension: gistkern {native.missing()}")
    some_layouts = {row.name for row in backends.BACKENDS if row.plain_only}
    if gpu and some_layouts.issuperset(serving["cuda"]):
        broken.append("no backend serves calls on this GPU; the reasons stand above")
    return {
        "usable": not broken,
        "cpu": serving["cpu"],
        "gpu": serving["cuda"] if gpu else None,
        "broken": broken,
        "missing": _missing(facts, gpu),
        "untested": untested,
    }


def _serving(rows: list[dict[str, Any]], device: str) -> list[str]:
    """The backends that ``backend="auto"`` may pick, the first choice first."""
    automatic = {row.name for row in backends.BACKENDS if row.automatic}
    return [row["name"] for row in rows if row["device"] == device and row["usable"] and row["name"] in automatic]


def _missing(facts: dict[str, Any], gpu: bool) -> list[dict[str, str]]:
    """What is not there, what it is for, and the command that installs it."""
    found = []

    def lacks(what: str, install: str) -> None:
        found.append({"what": what, "install": install})

    if native.missing() and not native.is_broken():
        lacks(f"fast CPU kernels: gistkern {native.missing()}", "pip install --no-build-isolation gistkern")
    elif gpu and torch.version.hip is None and native.missing_cuda():
        lacks("CUDA kernels for decoding: the extension was built without nvcc", "see docs/internals/extension.md")
    if gpu and facts["packages"]["triton"] is None:
        lacks("Triton, which serves GPUs", "pip install 'gistkern[triton]'")
    if not gpu and Path("/dev/nvidia0").exists():
        lacks(f"an NVIDIA GPU is here, torch {torch.__version__} does not see it", "install a CUDA build of torch")
    extras = [name for name in ("peft", "accelerate", "bitsandbytes") if facts["packages"][name] is None]
    if extras:
        lacks(f"for training, LoRA and 4-bit weights: {', '.join(extras)}", "pip install 'gistkern[train]'")
    return found
