"""Prepared launches give the driver what Triton's own launcher gives it, and refuse what a kernel would misread."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gistkern.backends import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the compiled extension")
ROOT = Path(__file__).parents[2]


def test_launches_over_a_stub_of_the_driver():
    """In a process of its own: the stub becomes its CUDA driver."""
    pytest.importorskip("triton")
    names = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/backends/launcher_cases.py"], cwd=ROOT, env=names, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_without_a_driver_nothing_is_launched():
    code = """
import torch
from gistkern.backends import native
launch = native.operators().launch
try:
    launch(torch.tensor([1, 1, 1, 1, 4, 0, 1, 0, 0, 1, 0]), [torch.zeros(1)], True)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no CUDA driver is loaded" in done.stdout


def test_a_launch_on_the_cpu_is_refused():
    description = torch.tensor([1, 1, 1, 1, 4, 0, 1, 0, 0, 1, 0])
    with pytest.raises(RuntimeError, match="tensor 0 of a launch must be on the GPU"):
        native.operators().launch(description, [torch.zeros(1)], False)
