"""The sanitizer catches what it is there for: bugs planted in a copy of the kernels make `tests/gpu` fail.

Each run is a process of its own on a copy of the sources; that the same tests pass on the real ones is `make sanitize`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ATTENTION = "test_kernel_attention.py::test_every_scheme[T=63-segments-torch.bfloat16]"
CHUNKS = "test_kernel_contracts.py::test_gist_gradients_in_row_chunks[folded-torch.float32]"

# name: file, what stands there, what is planted, the tests that must fail, and how
PLANTED = {
    "dropped-mask": (
        "attn_fwd.py",
        "if i_col + META.BN > columns.n_full:",
        "if i_col + META.BN > columns.n_full + META.BN:",
        ATTENTION,
        "exceeds the budget",
    ),
    "interval-one-too-long": (
        "primitives.py",
        "m_local = (o_col >= b_sees.local[:, None]) & (o_col <= b_sees.local_last[:, None])",
        "m_local = (o_col >= b_sees.local[:, None]) & (o_col <= b_sees.local_last[:, None] + 1)",
        ATTENTION,
        "exceeds the budget",
    ),
    "gist-interval-past-its-buffer": (
        "primitives.py",
        "n_gist = tl.maximum(tl.max(tl.where(m_gist, b_sees.gist_end, 0), 0) - gist_lo, 0)",
        "n_gist = tl.maximum(tl.max(tl.where(m_gist, b_sees.gist_end, 0), 0) - gist_lo + 1, 0)",
        ATTENTION,
        "past the end of the tensor",
    ),
    "last-tile-without-a-bound": (
        "primitives.py",
        "(o_m < (META.BM // META.PACK) * META.PACK) & (o_row < row_end)",
        "(o_m < (META.BM // META.PACK) * META.PACK) & (o_row < row_end + META.BM)",
        ATTENTION,
        "past the end of the tensor",
    ),
    "chunks-in-one-place": (
        "attn_bwd_dkv.py",
        "o_out = ((i_chunk * n_heads + i_bh)",
        "o_out = ((i_chunk * 0 + i_bh)",
        CHUNKS,
        "program instances",
    ),
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Run some of tests/gpu under ttsem on a copy of the sources, with one replacement made."""

    def run(file, old, new, selection):
        copy = tmp_path_factory.mktemp("copy")
        for part in ("gistkern", "kernels", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.py", copy)  # the path shim looks for it
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = (copy / "kernels" / file).read_text()
        assert source.count(old) == 1, f"{file} has changed: plant the bug anew"
        (copy / "kernels" / file).write_text(source.replace(old, new))
        environment = os.environ | {
            "GISTKERN_EMULATED": "1",
            "PYTHONPATH": str(copy),
            "TRITON_CACHE_DIR": str(copy / "cache"),
        }
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "ttsem.sanitize", "pytest", f"tests/gpu/{selection}"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"], cwd=copy, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_fails(sanitized, name):
    file, old, new, selection, symptom = PLANTED[name]
    code, output = sanitized(file, old, new, selection)
    assert code == 1, output[-3000:]
    assert symptom in output, output[-3000:]
