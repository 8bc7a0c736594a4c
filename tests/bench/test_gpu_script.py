"""`make gpu`: stages end at their limits, one that fails ends alone, and a killed run keeps what was there.

The dry run of every stage is the slow test: it does all that a GPU would do, in small.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import __main__ as script
from bench.gpu.__main__ import Process, run
from bench.gpu.stages import LIMITS, STAGES
from bench.measured import report as reports

ROOT = Path(gpu.__file__).parents[2]
ROW = 'print(\'{"call": "one", "seconds": 1.5}\', flush=True)'
HANGS = f"import subprocess, sys, time; {ROW}; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"


def python(code, limit=20.0):
    return Process([sys.executable, "-c", code], limit)


def saved(out):
    return json.loads((out / "gpu.json").read_text())


def test_limits_leave_room_within_the_eight_minutes():
    assert sum(LIMITS.values()) <= 60 * script.MINUTES
    assert set(LIMITS) < set(STAGES)
    assert list(LIMITS)[:2] == ["suite", "checks"], "what is right comes before what is fast"


def test_a_stage_that_hangs_ends_at_its_limit_and_one_that_fails_ends_alone(tmp_path):
    stages = {"hangs": python(HANGS, 2.0), "fails": python(f"{ROW}; raise ValueError('no such chip')")}
    stages |= {"works": python(f"{ROW}; {ROW}")}
    begun = time.monotonic()
    report = {"device": "cpu, rehearsal"}
    assert not run(stages, report, tmp_path, 60)
    assert time.monotonic() - begun < 30, "what a stage has started ends with it"
    assert saved(tmp_path) == report
    told = {one["stage"]: (one["ended"], one["rows"]) for one in report["stages"]}
    assert told == {"hangs": ("stopped at its limit of 2 s", 1), "fails": ("failed, status 1", 1), "works": ("well", 2)}
    assert report["hangs"] == [{"call": "one", "seconds": 1.5}]
    assert "no such chip" in (tmp_path / "gpu.log").read_text()


def test_no_stage_begins_when_the_time_is_over(tmp_path):
    report = {}
    assert not run({"late": python(ROW)}, report, tmp_path, 1)
    assert [one["ended"] for one in report["stages"]] == ["not begun: no time"]


def test_counts_that_go_on_replace_those_before(tmp_path):
    code = "import json\nfor n in 1, 2: print(json.dumps({'file': 'a', 'passed': n}))\nprint(json.dumps({'file': 'b'}))"
    report = {}
    assert run({"suite": python(code)}, report, tmp_path, 60)
    assert report["suite"] == [{"file": "a", "passed": 2}, {"file": "b"}]


def test_a_killed_run_keeps_what_was_there_and_ends_its_stage(tmp_path):
    child = tmp_path / "child"
    hangs = (
        f"import os, pathlib, time; pathlib.Path({str(child)!r}).write_text(str(os.getpid())); {ROW}; time.sleep(99)"
    )
    code = f"""
import pathlib, signal, sys
from bench.gpu.__main__ import Process, on_signals, run
on_signals()
run({{"hangs": Process([sys.executable, "-c", {hangs!r}], 90.0)}}, {{}}, pathlib.Path({str(tmp_path)!r}), 90)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "gpu.json").exists() and saved(tmp_path).get("hangs")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert saved(tmp_path)["hangs"] == [{"call": "one", "seconds": 1.5}]
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_a_rehearsal_is_never_recorded(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps({"device": "cpu, rehearsal"}))
    with pytest.raises(SystemExit, match="holds a rehearsal"):
        script.record(tmp_path)


def test_a_run_takes_the_place_of_the_sections_that_it_measured(tmp_path, monkeypatch):
    folder = tmp_path / "docs" / "results"
    monkeypatch.setattr(script, "RESULTS", folder)
    old = reports.header("cuda_of_the_past", "before") | {"device": "NVIDIA H1 80GB", "notes": ["an old note"]}
    number = {"median": 2.0, "min": 1.0, "max": 3.0}
    queueing = {"call": "forward", "heads": "x", "ours": number, "sdpa": number}
    layouts = {"layout": "64/4", "rows": 300, "slower_than_ours": {"dense mask": number}, "not_measured": {}}
    reports.write(old | {"queueing": [queueing], "layouts": [layouts]}, folder / "nvidia-h1-80gb.json")
    faster = queueing | {"ours": number | {"median": 7.0}, "by operators": number}
    new = old | {"command": "make gpu", "notes": [], "queueing": [faster], "decoding": [], "stages": []}
    (tmp_path / "gpu.json").write_text(json.dumps(new))
    path = script.record(tmp_path)
    found = json.loads(path.read_text())
    assert path == folder / "nvidia-h1-80gb.json"
    assert (found["queueing"], found["layouts"], found["decoding"]) == ([faster], [layouts], [])
    assert found["notes"][0].startswith("From before: layouts: `before`;")
    assert found["notes"][1:] == ["an old note"]
    page = folder.with_suffix(".md").read_text()
    assert "</a>forward | 7 | 2 | 2 |" in page
    assert "| call | gistkern | by operators | SDPA |" in page


def numbers(value):
    """All numbers within a row."""
    if isinstance(value, dict | list):
        values = value.values() if isinstance(value, dict) else value
        return [number for one in values for number in numbers(one)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_is_rehearsed(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)]
    pages = [ROOT / "docs" / "results.md", *(ROOT / "docs" / "results").iterdir()]
    before = [path.stat().st_mtime_ns for path in pages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = saved(tmp_path)
    assert {one["stage"]: one["ended"] for one in report["stages"]} == dict.fromkeys(LIMITS, "well"), done.stdout
    assert done.returncode == 0
    assert report["device"] == "cpu, rehearsal"
    for name in LIMITS:
        assert report[name], name
        for row in report[name]:
            found = numbers(row)
            assert found, row
            assert min(found) >= 0, row
            assert max(found) > 0, row
    assert "| queueing | well |" in done.stdout
    assert [path.stat().st_mtime_ns for path in pages] == before
    assert len(list((ROOT / "docs" / "results").iterdir())) == len(pages) - 1
