"""Hopper's kernels are launched with the parameters, tensor maps among them, that Triton gives the driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gistkern.backends import native

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(native.missing() is not None, reason="needs the extension")
def test_launches_over_a_stub_of_the_driver():
    """In a process of its own: the stub becomes its CUDA driver."""
    pytest.importorskip("triton")
    names = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "GISTKERN_HOPPER"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/backends/hopper_cases.py"], cwd=ROOT, env=names, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
