"""The page of real questions shows the committed answers, and names every task and method that there is."""

import json
import re
from pathlib import Path

from tasks.catalog import TASKS
from tasks.summary import METHODS, markdown, read_folder, rows_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "guides" / "real-questions.md").read_text("utf-8")
RESULTS = DOCS / "results" / "tasks-smollm2"


def test_the_table_is_that_of_the_answers():
    runs, lines = read_folder(RESULTS)
    rows = rows_of(lines)
    report = json.loads((DOCS / "results" / "tasks-smollm2.json").read_text("utf-8"))
    assert report["rows"] == rows
    assert report["runs"] == runs
    assert markdown(rows) in PAGE
    for run in runs:
        assert all(f"{name} {version}" in PAGE for name, version in run["versions"].items())


def test_every_task_and_method_stands_on_the_page():
    named = re.findall(r"`([\w*]+)`", PAGE)
    shown = [re.compile(name.replace("*", r"\w+") + "$") for name in named]
    assert not {name for name in (*TASKS, *METHODS) if not any(one.match(name) for one in shown)}
