"""The command end to end on a tiny model: every answer once, also after a kill, and bad input told in one line."""

import gzip
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import EXAMPLES, tiny_llama

from passkey.models import fast_tokenizer
from tasks import command
from tasks.catalog import TASKS
from tasks.record import read_record
from tasks.summary import METHODS

PARAGRAPHS = [
    {
        "article": f"Town {town}",
        "context": f"Town {town} has {town} mills and {town + 7} bridges. The river is cold.",
        "questions": [
            {"id": f"{town}-{of}", "question": f"How many {of}?", "answers": [answer]}
            for of, answer in (("mills", str(town)), ("bridges", str(town + 7)))
        ],
    }
    for town in range(4)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, questions, and a file that was trained on."""
    folder = tmp_path_factory.mktemp("tasks")
    for one in (tiny_llama(), fast_tokenizer()):
        one.save_pretrained(folder / "model")
    (folder / "squad.jsonl").write_text("".join(json.dumps(one) + "\n" for one in PARAGRAPHS))
    (folder / "train.jsonl").write_text(json.dumps({"context": PARAGRAPHS[2]["context"]}) + "\n")
    (folder / "other.jsonl").write_text(json.dumps({"context": "Something else."}) + "\n")
    (folder / "torn.jsonl").write_text("{")
    return folder


def run(place, words):
    spelled = re.sub(r"\{(.*?)\}", lambda found: str(place / found[1]), words)
    command.main("", shlex.split(spelled))


ASKED = "--model {model} --squad {squad.jsonl} --tasks squad rules --n 5 --ratios 2 4 --trained-on {other.jsonl}"


def test_everything_is_answered_once(place, tmp_path, capsys):
    for count in (1, 2):
        run(place, f"{ASKED} --output {tmp_path}")
        for method, cells in {"full": 2, "none": 2, "truncated": 4, "bm25": 4}.items():
            _, lines, _ = read_record(tmp_path / f"answers-{method}.jsonl.gz")
            assert len(lines) == 5 * cells
            assert len({(one["task"], one["ratio"], one["id"]) for one in lines}) == 5 * cells
        found = json.loads((tmp_path / "summary.json").read_text())
        assert len(found["rows"]) == 12, count
        assert {row["n"] for row in found["rows"]} == {5}
        assert (tmp_path / "summary.md").read_text().count("\n") == 14
    assert "95 % interval" in capsys.readouterr().out
    run(place, f"{ASKED.replace('--n 5', '--n 6')} --output {tmp_path} --methods full")
    _, lines, _ = read_record(tmp_path / "answers-full.jsonl.gz")
    assert len(lines) == 12  # one more of each task


def test_a_killed_run_goes_on_to_the_same_answers(place, tmp_path):
    run(place, f"{ASKED} --output {tmp_path / 'whole'} --methods truncated")
    run(place, f"{ASKED} --output {tmp_path / 'torn'} --methods truncated")
    torn = tmp_path / "torn" / "answers-truncated.jsonl.gz"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size * 2 // 3])
    run(place, f"{ASKED} --output {tmp_path / 'torn'} --methods truncated")

    def answers(name):
        _, lines, _ = read_record(tmp_path / name / "answers-truncated.jsonl.gz")
        return sorted((one["task"], one["ratio"], one["id"], one["said"]) for one in lines)

    assert answers("torn") == answers("whole")


def test_a_line_says_what_was_asked_and_what_it_is_worth(place, tmp_path):
    run(place, f"{ASKED} --output {tmp_path} --methods full")
    first, *lines = map(json.loads, gzip.decompress((tmp_path / "answers-full.jsonl.gz").read_bytes()).splitlines())
    assert first["model"]["name"] == "model"
    assert first["versions"].keys() == {"torch", "transformers", "python"}
    assert str(place) not in json.dumps(first)
    asked = {line["id"]: line for line in lines if line["task"] == "squad"}
    for name, line in asked.items():
        assert any(name == question["id"] for one in PARAGRAPHS for question in one["questions"])
        assert list(line["scores"]) == ["f1", "exact", "contained"]
        assert line["rows"] == line["tokens"] > 0


def test_the_list_shows_every_task(capsys):
    command.main("", ["--list"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == list(TASKS)
    assert all(score in line for line, task in zip(said, TASKS.values(), strict=True) for score in task.scores)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks squad", "the following arguments are required: --output"),
        ("--output {out} --tasks sqaud", "invalid choice: 'sqaud'"),
        ("--output {out} --methods h2o", "invalid choice: 'h2o'"),
        ("--output {out} --ratios 0.5", "expected at least 1, got 0.5"),
        ("--output {out} --ratios nan", "expected at least 1, got nan"),
        ("--output {out} --n 0", "expected at least 1"),
        ("--output {squad.jsonl}", "cannot write to a folder"),
        ("--output {out} --squad {none}", "no file"),
        ("--output {out} --squad {torn.jsonl}", "torn.jsonl, line 1 is no JSON"),
        ("--output {out} --squad {squad.jsonl} --trained-on {train.jsonl}", "1 articles .* trained on .*Town 2"),
        ("--output {out} --trained-on {train.jsonl}", "pass --squad"),
        ("--output {out} --model {model}", "squad asks the questions of a file: pass --squad"),
        ("--output {out} --model {model} --squad {squad.jsonl} --n 9", "the file holds 8 questions, asked for 9"),
        ("--output {out} --model {model} --tasks rules --methods kvzip", "kvzip is kvpress', which has an environment"),
        ("--output {out} --model {model} --tasks vt --lengths 64", "64 tokens are too few"),
    ],
)
def test_bad_input(place, words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(SystemExit, match="2"):
        run(place, words.replace("{out}", str(tmp_path)))
    assert re.search(f"error: .*{message}", capsys.readouterr().err.splitlines()[-1])


def test_a_wrong_option_is_refused_before_anything_loads():
    code = f"""import sys, runpy
sys.argv = ['tasks.py', '--jsn']
try: runpy.run_path({str(EXAMPLES / "tasks.py")!r}, run_name='__main__')
except SystemExit as stop: assert stop.code == 2 and not {{'torch', 'transformers', 'gistkern'}} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr


def test_every_method_is_named_once():
    assert len(set(METHODS)) == len(METHODS) == 10
    assert set(command.PRESSES) == {"kvzip", "adakv", "snapkv", "compactor", "expected_attention"}
