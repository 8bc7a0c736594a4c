"""Configs measured on a device: the JSON file that `autotune` writes and GISTKERN_CONFIGS names."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["ENVIRONMENT", "FIELDS", "lookup", "read", "write"]

ENVIRONMENT = "GISTKERN_CONFIGS"
FIELDS = ("block_rows", "block_cols", "num_warps", "num_stages")
_FORMAT = 1


def _triton_version() -> str:
    import triton  # here: reading the name of the variable needs no Triton

    return triton.__version__


def write(path: Path, device: str, arch: str, rows: list[dict[str, Any]]) -> None:
    """Write measured rows (`FIELDS` and kernel, width, itemsize, milliseconds) of one device, whole or not at all."""
    content = {"format": _FORMAT, "device": device, "arch": arch, "triton": _triton_version(), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def read(path: Path, arch: str) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Rows of a tuning file by (kernel, itemsize, width).

    Raises
    ------
    ValueError
        If the file is not one, or was made for another architecture or Triton version.
    """
    again = f"run `python -m gistkern.autotune --out {path}` on this device, or unset {ENVIRONMENT}"
    try:
        content = json.loads(path.read_text())
        found = content["format"], content["arch"], content["triton"]
        rows = {(row["kernel"], row["itemsize"], row["width"]): row for row in content["rows"]}
        complete = all(isinstance(row[field], int) for row in rows.values() for field in FIELDS)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of tuned configs ({error!r}): {again}") from error
    if not complete:
        raise ValueError(f"{path} has rows without whole numbers for {', '.join(FIELDS)}: {again}")
    expected = _FORMAT, arch, _triton_version()
    if found != expected:
        raise ValueError(f"{path} holds (format, arch, triton) {found}, expected {expected}: {again}")
    return rows


def lookup(kernel: str, arch: str, width: int, itemsize: int) -> dict[str, Any] | None:
    """The measured row for a kernel, if GISTKERN_CONFIGS names a file that has one."""
    name = os.environ.get(ENVIRONMENT)
    return None if not name else _read_once(name, arch).get((kernel, itemsize, width))


@cache
def _read_once(name: str, arch: str) -> dict[tuple[str, int, int], dict[str, Any]]:
    return read(Path(name), arch)
