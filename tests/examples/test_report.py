"""Reports: what is written, line by line, and what the terminal shows."""

import json

import pytest

from passkey import report


def row(**changed):
    depths = [{"depth": (index + 0.5) / 10, "n": 10, "exact": index / 10} for index in range(10)]
    made = {
        "language": "en",
        "tokens": 3000,
        "filler": "templates",
        "wordings": "training",
        "keys": 1,
        "gist_tokens": 10,
        "ratio": 300.0,
        "n": 100,
        "exact": 0.93,
        "wilson_low": 0.863,
        "wilson_high": 0.966,
        "digit": 0.95,
        "hallucinated": 0.06,
        "hallucinated_context": 0.04,
        "hallucinated_invented": 0.02,
        "abstained": 0.01,
        "full_kv_bytes": 6_144_000,
        "gist_kv_bytes": 20_480,
        "bytes_ratio": 300.0,
        "by_depth": depths,
    }
    return {**made, **changed}


ROWS = [row(), row(filler="prose", wordings="held_out", exact=0.5, wilson_low=0.404, wilson_high=0.596)]


def test_a_report_is_a_line_per_row_and_a_table(tmp_path, capsys):
    whole = [row(exact=1.0, gist_tokens=3000, ratio=1.0)]
    made = {"preset": "smoke", "decoding": "greedy", "rows": ROWS, "swap": None, "full_context": whole}
    report.write_report(made, tmp_path / "new")
    text = (tmp_path / "new" / "report.json").read_text()
    found = json.loads(text)
    assert found.pop("environment")["versions"].keys() == {"gistkern", "torch", "transformers", "python"}
    assert found == made
    lines = text.splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines if line.startswith(" {")] == [*ROWS, *whole]
    assert len(lines) == 2 + len(found) + 1 + 2 + len(ROWS) + len(whole), "a line per key, and per row of a table"
    said = capsys.readouterr().out
    assert "whole context in sight:\nquestions" in said
    assert not list((tmp_path / "new").glob("*.tmp"))


def test_the_table_says_what_the_questions_are():
    said = report.show([*ROWS, row(keys=4)]).splitlines()
    assert max(map(len, said)) <= 100
    head, _, plain, *prose, keys = (" ".join(line.split()) for line in said)
    assert head.startswith("questions tokens rows ratio n exact 95 % interval digits")
    assert plain == "en 3,000 10 300x 100 93.0% 86.3% to 96.6% 95.0% 6.0% 1.0%"
    assert prose[0].startswith("en, prose, ")
    assert "3,000 10 300x 100 50.0% 40.4% to 59.6%" in prose[0]
    assert "held-out wordings" in " ".join(prose).replace(" 3,000 10 300x 100 50.0% 40.4% to 59.6% 95.0% 6.0% 1.0%", "")
    assert keys.startswith("en, 4 keys 3,000")


@pytest.mark.parametrize("content", ['{"a": ', "[" * 10**5])
def test_what_is_no_json_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no JSON"):
        report.read_json(path)
