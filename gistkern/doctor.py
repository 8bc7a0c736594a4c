"""``python -m gistkern.doctor [--json]``: versions, devices, and what each backend can do here."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch
from packaging.version import Version

import gistkern
from gistkern import backends
from gistkern.backends import native
from gistkern.kernels.chips import chip_for
from gistkern.kernels.tuned import ENVIRONMENT

__all__ = ["main", "report"]

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
    return {
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
    reason = row.reason(torch.empty(0, device=device))
    return {"name": row.name, "device": device, "usable": reason is None, "reason": reason, "what": row.what}


def main(arguments: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m gistkern.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print machine-readable JSON")
    facts = report()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
        return
    print(f"gistkern {facts['gistkern']}, Python {facts['python']}, {facts['platform']}")
    for name, version in facts["packages"].items():
        print(f"  {name:14} {version or 'not installed'}{_verdict(facts['tested'].get(name))}")
    print("devices")
    for device in facts["devices"]:
        print("  " + ", ".join(f"{key} {value}" for key, value in device.items()))
    extension = facts["extension"]
    if extension["loaded"]:
        compiled = extension["cuda_archs"]
        print(
            f"extension {extension['file']}: CPU kernels for {extension['instruction_set']}, "
            + (f"CUDA kernels for {compiled}" if compiled else "no CUDA kernels (built without nvcc)")
        )
    else:
        print(f"extension not loaded: {extension['reason']}")
    print(f"tile configs {facts['tuned_configs'] or f'as shipped ({ENVIRONMENT} names no file)'}")
    print("backends (float32)")
    for row in facts["backends"]:
        verdict = "usable" if row["usable"] else f"not usable: {row['reason']}"
        print(f"  {row['name']:10} on {row['device']:5} {verdict} ({row['what']})")


def _verdict(tested: dict[str, Any] | None) -> str:
    """What stands behind a version in the printed report."""
    if tested is None or tested["within"] is None:
        return ""
    versions = f"{tested['oldest']} to {tested['newest']}"
    return f" (tested: {versions})" if tested["within"] else f" (NOT TESTED; the versions from {versions} are)"


if __name__ == "__main__":
    main()
