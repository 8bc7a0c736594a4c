"""Tests of the Triton kernels, written for a GPU.

The same files run in three ways (docs/internals/evidence.md): on a GPU (``pytest -m gpu``), in Triton's interpreter
(``make emulate``) and as compiled IR under ttsem's sanitizer (``make sanitize``). In the last two, launches take
CPU tensors.
"""

import pytest
import torch
from emulation import EMULATED, INTERPRETED, tiles

from gistkern.kernels import configs


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a GPU; without one: make emulate, make sanitize")
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.gpu)
        if not EMULATED and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    """Where the tensors live: ttsem turns "cuda" into the CPU by itself, the interpreter does not."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """Of calls like these, from tests that have changed what kernels are launched with."""
    monkeypatch.setattr("gistkern.backends.triton_plan._known", {})


@pytest.fixture
def small_tiles():
    """Tiles of 16 by 16, so that small inputs have many programs, boundaries and full tiles."""
    with configs.overridden(**tiles(16, 16)):
        yield
