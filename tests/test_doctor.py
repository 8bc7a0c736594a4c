import json
import subprocess
import sys

from gistkern import backends, doctor


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


def test_text_report_names_every_backend_and_reason(capsys, monkeypatch):
    broken = backends.Backend("broken", "none", True, "a test", lambda: "needs a moon", lambda q: None)
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, broken))
    doctor.main([])
    printed = capsys.readouterr().out
    assert "cpu        on cpu   usable" in printed
    assert "broken     on cpu   not usable: needs a moon" in printed
    assert "flash-attn     not installed" in printed
    assert "triton     on cpu   not usable: serves CUDA and ROCm tensors, got cpu" in printed
    assert "tile configs as shipped (GISTKERN_CONFIGS names no file)" in printed
