"""How a call of a case becomes a benchmark of pytest-benchmark."""

import pytest
import torch

from bench.measured.timing import finished

ROUNDS = 3


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def rows(device):
    """The longest at which everything, FlexAttention's compiling aside, is seconds."""
    return 16384 if device == "cuda" else 2048


@pytest.fixture
def timed(benchmark):
    def run(case, name, group):
        if name not in case.calls:
            pytest.skip(f"not measured: {case.not_measured[name]}")
        benchmark.group = group
        benchmark.pedantic(finished(case.calls[name], case.device), rounds=ROUNDS, warmup_rounds=1)

    return run
