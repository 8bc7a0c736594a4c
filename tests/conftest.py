"""Every `torch.empty` is NaN-filled (deterministic mode does that), so an unwritten output shows."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # pytest's readline sets it to 80, and its workers' tables would be as narrow
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic mode refuses products on a GPU

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "gistkern", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("gistkern")


@pytest.fixture(autouse=True)
def poison_and_seed():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
