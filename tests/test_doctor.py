import contextlib
import ctypes.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gistkern import backends, doctor
from gistkern.backends import native
from gistkern.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]


def pins(*files):
    """The versions that lists of requirements name; a later file's win."""
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_tested_versions_are_those_that_make_compat_runs():
    oldest, newest = (
        pins("constraints.txt", "tests/compat/floor.txt"),
        pins("constraints.txt", "tests/compat/newest.txt"),
    )
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*declared["dependencies"], *declared["optional-dependencies"]["train"]]
    ranges = {one.name: one.specifier for one in map(Requirement, requirements)}
    for name, versions in doctor._TESTED.items():
        assert versions == (oldest[name], newest[name])
        assert all(version in ranges[name] for version in versions)
        major, minor, *_ = oldest[name].split(".")
        assert f"{major}.{int(minor) - 1}.99" not in ranges[name], "what is older was not run"


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("5.5.4", "5.5.4 NOT TESTED: 5.6.0 to 5.24.0 are"),
        ("5.24.9", "5.24.9 5.6.0 to 5.24.0"),
        ("5.25.0.dev0", "5.25.0.dev0 NOT TESTED: 5.6.0 to 5.24.0 are"),
        (None, "not installed"),
    ],
)
def test_versions_outside_the_tested_range_are_named(installed, said, capsys, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: installed if name == "transformers" else version(name))
    older = installed == "5.5.4"
    with pytest.raises(SystemExit, match="1") if older else contextlib.nullcontext():
        main(["doctor"])
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if line.startswith("transformers "))
    assert " ".join(row.split()) == f"transformers {said}"
    assert max(map(len, printed.splitlines())) <= 100
    assert ("  versions    not tested: transformers 5.25.0.dev0" in printed) == (installed == "5.25.0.dev0")
    assert ("verdict: BROKEN" in printed) == older
    assert (
        "  broken      transformers 5.5.4 (tested: 5.6.0 to 5.24.0): gistkern needs a newer one" in printed
    ) == older
    within = {"5.24.9": True, None: None}.get(installed, False)
    assert doctor.report()["tested"]["transformers"]["within"] is within


def test_json_report_is_complete():
    done = subprocess.run(
        [sys.executable, "-m", "gistkern", "doctor", "--json"], capture_output=True, text=True, check=True
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
    main(["doctor"])
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for start in (
        "sdpa cpu yes flash-style",
        "broken cpu no: needs a moon a test",
        "flash-attn not installed",
        "triton cpu no: serves CUDA and ROCm tensors,",  # where it wraps depends on the longest reason
        "tile configs as shipped (GISTKERN_CONFIGS names no file)",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert max(map(len, printed.splitlines())) <= 100


def test_the_report_says_why_there_is_no_extension(tmp_path):
    """No library, no library at all, a torn one, another's: each is told, and the Python backends serve."""
    torn = tmp_path / "torn.so"
    torn.write_bytes(native.library_path().read_bytes()[:100_000] if native.missing() is None else b"torn")
    foreign = ctypes.util.find_library("m") and next(Path("/lib").glob("*/libm.so.6"), None)
    libraries = {"/nowhere/_C.so": "which is not built (no /nowhere/_C.so)", __file__: "is torn", str(torn): "is torn"}
    if foreign:
        libraries[str(foreign)] = "which does not work here"
    for library, message in libraries.items():
        environment = os.environ | {native.LIBRARY: library}
        command = [sys.executable, "-m", "gistkern", "doctor", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        facts = json.loads(done.stdout)
        there = Path(library).exists()  # a library that is not there is missing, one that does not load is broken
        assert done.returncode == there == (not facts["verdict"]["usable"])
        assert any(message in line for line in facts["verdict"]["broken"]) == there
        assert any("pip install" in one["install"] for one in facts["verdict"]["missing"]) == (not there)
        assert message in facts["extension"]["reason"]
        usable = {row["name"]: row for row in facts["backends"]}
        assert message in usable["cpu"]["reason"]
        assert usable["sdpa"]["usable"]


def test_an_older_torch_gets_the_python_backends(monkeypatch):
    if native.missing():
        pytest.skip("needs the extension")
    monkeypatch.setattr(native.torch, "__version__", "2.9.1+cpu")
    assert native._load() == "needs torch >= 2.10 (libtorch's stable ABI), this is 2.9.1+cpu"


def test_a_library_of_another_version_is_not_used(monkeypatch):
    if native.missing():
        pytest.skip("needs the extension")
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    assert "build it again" in native._load()


def test_an_instruction_set_that_is_not_there_is_an_error():
    environment = os.environ | {"GISTKERN_CPU_ISA": "mmx"}
    code = "from gistkern.backends import native; print(native.missing())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert native.missing() or "GISTKERN_CPU_ISA must be avx512, avx2 or baseline" in done.stdout


def facts_with(monkeypatch, gpu=False, **without):
    """The report of a machine that has a GPU, or lacks a package."""
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in without else version(name))
    monkeypatch.setattr(doctor, "_device_names", lambda: ["cpu", "cuda"] if gpu else ["cpu"])
    monkeypatch.setattr(doctor, "_backend", lambda row, device: usable(row, device, without))
    return doctor.report()


def usable(row, device, without):
    serves = row.name in ({"cpu": ("cpu", "sdpa"), "cuda": ("triton", "cuda")}[device])
    serves = serves and row.name not in without
    return {"name": row.name, "device": device, "usable": serves, "reason": None if serves else "?", "what": ""}


def test_the_verdict_names_what_serves_and_what_is_missing(monkeypatch):
    verdict = facts_with(monkeypatch)["verdict"]
    assert verdict["usable"]
    assert (verdict["cpu"], verdict["gpu"]) == (["cpu", "sdpa"], None)
    verdict = facts_with(monkeypatch, gpu=True)["verdict"]
    assert verdict["usable"]
    assert verdict["gpu"] == ["cuda", "triton"]
    verdict = facts_with(monkeypatch, gpu=True, triton=True, cuda=True, peft=True)["verdict"]
    assert verdict["broken"] == ["no backend serves calls on this GPU; the reasons stand above"]
    installs = [one["install"] for one in verdict["missing"]]
    assert installs[-2:] == ["pip install 'gistkern[triton]'", "pip install 'gistkern[train]'"]


def test_an_older_torch_misses_the_extension_and_is_not_broken(monkeypatch):
    monkeypatch.setattr(native, "_MISSING", "needs torch >= 2.10 (libtorch's stable ABI), this is 2.9.1")
    verdict = doctor.report()["verdict"]
    assert verdict["usable"]
    assert "needs torch >= 2.10" in verdict["missing"][0]["what"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command):
    """What takes seconds to import is imported by what needs it: a second's answer to --help depends on that."""
    code = f"""
import sys
from gistkern.cli.main import COMMANDS, main
try:
    main([{command!r}, "--help"] if {command!r} else ["--help"])
except SystemExit as done:
    assert done.code == 0
print(sorted({{"torch", "transformers", "numpy", "triton", "peft", "yaml"}} & sys.modules.keys()), len(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, count = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert heavy == "[]"
    assert int(count) < 400


@pytest.mark.parametrize(("kind", "said"), [("gemma2", "soft-capped"), ("gpt2", "no rotary position embeddings")])
def test_a_model_that_is_refused_is_refused_by_the_calculator_too(tmp_path, capsys, kind, said):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--model", str(tmp_path), "--tokens", "600"])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
