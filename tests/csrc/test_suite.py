"""The CUDA kernels' own sources on the CPU, in a program without Python and torch: csrc/testing/suite.cpp.

Plain in `make test`; with the address, undefined-behavior and thread sanitizers in `make sanitize`.
"""

import os
import subprocess

import pytest

pytestmark = pytest.mark.slow

SOURCES = ("decode.cu", "compact.cu", "testing/suite.cpp")
# g++ does not know nvcc's unrolling, and follows registers through templates less well than nvcc
OPTIONS = ("-DGISTKERN_EMULATED", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")


@pytest.fixture(scope="module")
def suite(emulated):
    """Run the suite of a build; (exit status, output)."""

    def run(sanitizer, *names, seed=1, order=1):
        environment = {"GISTKERN_SUITE_SEED": str(seed), "GISTKERN_EMULATOR_SEED": str(order)}
        command = [emulated(SOURCES, sanitizer, *OPTIONS), *names]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.xdist_group("suite-plain")
@pytest.mark.parametrize("seed", [1, 2])
def test_every_case_passes(suite, seed):
    code, output = suite("plain", seed=seed, order=seed)
    assert code == 0, output[-3000:]
    assert " passed, " in output


@pytest.mark.xdist_group("suite-plain")
def test_a_name_that_selects_nothing_fails(suite):
    code, output = suite("plain", "no-such-case")
    assert code == 1
    assert "0 passed, 0 skipped, 0 failed" in output


@pytest.mark.sanitize
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_every_case_passes_under_the_sanitizers(suite, sanitizer):
    code, output = suite(sanitizer)
    assert code == 0, output[-3000:]
    assert "ERROR: AddressSanitizer" not in output
    assert "WARNING: ThreadSanitizer" not in output
