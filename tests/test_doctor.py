import ctypes.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gistkern import backends, doctor, native


def test_json_report_is_complete():
    done = subprocess.run(
        [sys.executable, "-m", "gistkern.doctor", "--json"], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["packages"]["flash-attn"] is None
    assert {row["name"] for row in facts["backends"]} == {row.name for row in backends.BACKENDS}
    assert all(row["usable"] != bool(row["reason"]) for row in facts["backends"])
    assert facts["devices"][0]["device"] == "cpu"
    extension = facts["extension"]
    assert extension["loaded"] == (native.missing() is None)
    if extension["loaded"]:
        assert extension["instruction_set"] in ("avx512", "avx2", "baseline")
        assert next(row for row in facts["backends"] if row["name"] == "cpu")["usable"]


def test_text_report_names_every_backend_and_reason(capsys, monkeypatch):
    broken = backends.Backend("broken", "none", True, "a test", lambda: "needs a moon", lambda q: None)
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, broken))
    doctor.main([])
    printed = capsys.readouterr().out
    assert "sdpa       on cpu   usable" in printed
    assert "broken     on cpu   not usable: needs a moon" in printed
    assert "flash-attn     not installed" in printed
    assert "triton     on cpu   not usable: serves CUDA and ROCm tensors, got cpu" in printed
    assert "tile configs as shipped (GISTKERN_CONFIGS names no file)" in printed


def test_the_report_says_why_there_is_no_extension(tmp_path):
    """No library, no library at all, a torn one, another's: each is told, and the Python backends serve."""
    torn = tmp_path / "torn.so"
    torn.write_bytes(native.library_path().read_bytes()[:100_000] if native.missing() is None else b"torn")
    foreign = ctypes.util.find_library("m") and next(Path("/lib").glob("*/libm.so.6"), None)
    libraries = {"/nowhere/_C.so": "which is not built (no /nowhere/_C.so)", __file__: "is torn", str(torn): "is torn"}
    if foreign:
        libraries[str(foreign)] = "which does not work here"
    for library, message in libraries.items():
        code = "import torch; from gistkern import doctor; doctor.main(['--json'])"
        environment = os.environ | {native.LIBRARY: library}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        facts = json.loads(done.stdout)
        assert message in facts["extension"]["reason"]
        usable = {row["name"]: row for row in facts["backends"]}
        assert message in usable["cpu"]["reason"]
        assert usable["sdpa"]["usable"]


def test_an_older_torch_gets_the_python_backends(monkeypatch):
    if native.missing():
        pytest.skip("needs the extension")
    monkeypatch.setattr(native.torch, "__version__", "2.9.1+cpu")
    assert native._load() == "needs torch >= 2.11 (libtorch's stable ABI), this is 2.9.1+cpu"


def test_a_library_of_another_version_is_not_used(monkeypatch):
    if native.missing():
        pytest.skip("needs the extension")
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert "build it again" in native._load()


def test_an_instruction_set_that_is_not_there_is_an_error():
    environment = os.environ | {"GISTKERN_CPU_ISA": "mmx"}
    code = "from gistkern import native; print(native.missing())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert native.missing() or "GISTKERN_CPU_ISA must be avx512, avx2 or baseline" in done.stdout
