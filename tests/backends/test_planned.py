"""Planned forwards and backwards as one call of the extension (docs/internals/host.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gistkern.backends import native

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("cases", ["planned_cases.py", "hopper_planned_cases.py"])
@pytest.mark.skipif(native.missing() is not None, reason="needs the extension")
def test_planned_calls_over_a_stub_of_the_driver(cases):
    """In a process of its own: the stub becomes its CUDA driver."""
    pytest.importorskip("triton")
    names = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, f"tests/backends/{cases}"], cwd=ROOT, env=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
