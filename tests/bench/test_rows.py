"""The committed reports: one row a line, and answers that add up to their summary."""

import gzip
import json
from pathlib import Path

import pytest

from bench.rows import dumps, write_report

DOCS = Path(__file__).parents[2] / "docs"
REPORTS = sorted(DOCS.rglob("*.json"))
LONGEST = 4000


def test_a_row_is_a_line(tmp_path):
    report = {"grade": "measured", "config": [128, 64], "none": [], "rows": [{"a": [{"b": "다"}]}, {"a": 0.1}]}
    write_report(tmp_path / "new" / "report.json", report)
    text = (tmp_path / "new" / "report.json").read_text("utf-8")
    assert json.loads(text) == report
    assert text.splitlines() == [
        "{",
        '"grade": "measured",',
        '"config": [128, 64],',
        '"none": [],',
        '"rows": [',
        ' {"a": [{"b": "다"}]},',
        ' {"a": 0.1}',
        "]",
        "}",
    ]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_reports_have_one_row_a_line(path):
    text = path.read_text("utf-8")
    assert text == dumps(json.loads(text))


def test_reports_are_short():
    assert sum(len(path.read_text("utf-8").splitlines()) for path in REPORTS) <= LONGEST


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*-answers.jsonl.gz")), ids=lambda path: path.stem)
def test_answers_add_up_to_the_summary(path):
    summary = json.loads(path.with_name(path.name.replace("-answers.jsonl.gz", ".json")).read_text("utf-8"))
    keys = ("task", "language", "tokens", "filler", "wordings", "keys")
    answers: dict[tuple, list[bool]] = {}
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        answer = json.loads(line)
        answers.setdefault(tuple(answer[key] for key in keys), []).append(answer["outcome"] == "exact")
    assert len(answers) == len(summary["rows"])
    for row in summary["rows"]:
        found = answers[tuple(row[key] for key in keys)]
        assert (len(found), sum(found) / len(found)) == (row["n"], pytest.approx(row["exact"]))
