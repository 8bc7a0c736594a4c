"""Reports: what the tables and plots of one and of several reports say."""

import json
import math

import pytest
from matplotlib import pyplot

import plots
import report
from poc import ROWS


def row(**changed):
    depths = [{"depth": (index + 0.5) / 10, "n": 10, "exact": index / 10} for index in range(10)]
    made = {
        "task": "passkey",
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
        "chance": 1e-5,
        "full_kv_bytes": 6_144_000,
        "gist_kv_bytes": 20_480,
        "bytes_ratio": 300.0,
        "by_depth": depths,
    }
    return {**made, **changed}


def made(*rows, **changed):
    return {
        "preset": "smoke",
        "checkpoint": "checkpoint-000009",
        "seed": 2,
        "training": {"steps": 1100, "tokens": 7_000_000, "cpu_seconds": 630},
        "model": {"type": "llama", "parameters": 230_000, "dtype": "float32"},
        "decoding": "greedy",
        "rows": list(rows),
        "swap": None,
        "side_by_side": None,
        **changed,
    }


MIXED = (
    row(),
    row(filler="prose", wordings="held_out", exact=0.5, wilson_low=0.404, wilson_high=0.596),
    {k: v for k, v in row(task="counting", language="ko", chance=1 / 9).items() if k not in ("digit", "by_depth")},
)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def test_one_report_as_markdown():
    text = report.markdown(made(*MIXED, full_context=[row(exact=1.0, gist_tokens=3000, ratio=1.0)]))
    plain, prose, counting = (line for line in text.splitlines() if "| 300x |" in line)
    assert plain == (
        "| en | 3,000 | 10 | 300x | 6,144,000 | 20,480 | 100 | 93.0% | 86.3% to 96.6% | 1e-05 | 95.0% "
        "| 4.0% | 2.0% | 1.0% |"
    )
    assert prose.startswith("| en, prose, held-out wordings | 3,000 |")
    assert "| 11.1% |  |" in counting, "chance, and no digits"
    assert "whole context in sight:\n\n| questions" in text
    assert "Trained: 1,100 steps, 7,000,000 rows of token streams, 10.5 CPU minutes." in text


@pytest.mark.parametrize(
    ("paying", "said"),
    [
        ([None, None], "never pays."),
        ([1, None], "pays with 1 or more questions on one context."),
        ([1, 7], "pays with 1 to 7 questions on one context."),
    ],
)
def test_when_compressing_pays_is_said(paying, said):
    side = {"time_to_first_token_s": 1.0, "decode_tokens_per_s": 9.0, "total_s": [1.0, 2.0]}
    side |= {"prefill_peak_bytes": None, "decode_peak_bytes": None}
    both = {
        "gist": side,
        "full": side,
        "tokens": 9,
        "runs": 3,
        "threads": 1,
        "questions": 2,
        "paying_questions": paying,
    }
    assert said in report.markdown(made(row(), side_by_side=both))


def test_several_reports_beside_the_proof_of_concept(tmp_path, capsys):
    paths = [write(tmp_path / name / "report.json", made(*MIXED, seed=s)) for name, s in (("first", 0), ("second", 1))]
    report.main([*paths, "--out", str(tmp_path / "docs" / "all")])
    text = (tmp_path / "docs" / "all.md").read_text()
    assert text in capsys.readouterr().out
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    theirs, ours = lines[:2], lines[2:]
    for line, tokens, exact in zip(theirs, ("2,990", "6,096"), ("14.0%", "23.0%"), strict=True):
        assert "as reported by it" in line[0]
        assert (line[3], line[6], line[7]) == (tokens, exact, "not reported")
    assert [line[0].strip("| ") for line in ours] == ["first"] * 3 + ["second"] * 3
    assert [line[-1].strip("| ") for line in ours[:3]] == ["yes", "no", ""], "the target is one for passkeys"
    assert "not measured again" in text
    assert "- second: preset smoke, checkpoint-000009, seed 1" in text
    for picture in ("all-ratio.png", "all-kv.png", "all-depth.png"):
        assert (tmp_path / "docs" / picture).read_bytes()[:4] == b"\x89PNG"
        assert f"]({picture})" in text


def test_reports_of_earlier_versions_are_read(tmp_path):
    """Version 0.1.0 knew one kind of question, and no outcomes but exact."""
    newer = {"task", "filler", "wordings", "keys", "hallucinated", "hallucinated_context", "hallucinated_invented"}
    rows = [{name: value for name, value in row().items() if name not in newer | {"abstained"}}]
    path = tmp_path / "old.json"
    write(path, {"preset": "tiny", "checkpoint": "checkpoint-001371", "decoding": "greedy", "rows": rows})
    found = report.read_report(path)
    text = report.comparison({"old": found})
    assert (
        "| old | tiny | en | 3,000 | 10 | 300x | 93.0% | 86.3% to 96.6% | 100 | not reported | not reported |" in text
    )
    assert "| 95.0% | not reported | not reported | not reported |" in report.markdown(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": [{"language": "en"}]}, "is no report of train_niah.py or eval_niah.py"),
        ({}, "is no report"),
        (None, "is no report"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, capsys, content, message):
    path = write(tmp_path / "x.json", content)
    with pytest.raises(SystemExit, match="2"):
        report.main([path, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_reports_need_different_names(tmp_path, capsys):
    paths = [write(tmp_path / folder / "run" / "report.json", made(row())) for folder in "ab"]
    with pytest.raises(SystemExit, match="2"):
        report.main([*paths, "--out", str(tmp_path / "out")])
    assert "these would be run, run" in capsys.readouterr().err


@pytest.fixture
def axes(monkeypatch):
    """The axes of the picture that was drawn last."""
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    yield lambda: pyplot.gcf().axes[0]
    monkeypatch.undo()
    pyplot.close("all")


def test_accuracy_plot_has_every_row_and_its_interval(tmp_path, axes):
    rows = [row(), row(ratio=600.0, exact=0.8, wilson_low=0.7, wilson_high=0.9), MIXED[1]]
    plots.accuracy_against_ratio({"ours": rows}, tmp_path / "x.png")
    containers = axes().containers
    assert [container.get_label() for container in containers] == ["ours: en", "ours: en, prose, held-out wordings"]
    line, _, (bars,) = containers[0].lines
    assert [tuple(point) for point in line.get_xydata()] == [(300.0, 0.93), (600.0, 0.8)]
    ends = [end for segment in bars.get_segments() for end in segment[:, 1]]
    assert ends == pytest.approx([0.863, 0.966, 0.7, 0.9])
    crosses = [line for line in axes().lines if "proof of concept" in str(line.get_label())]
    assert crosses[0].get_xydata().tolist() == [[one["ratio"], one["exact"]] for one in ROWS]


def test_bytes_plot_has_both_caches(tmp_path, axes):
    plots.kv_bytes({"ours": [row()]}, tmp_path / "x.png")
    full, gist = axes().containers
    assert [bar.get_width() for bars in (full, gist) for bar in bars] == [6_144_000, 20_480]


def test_depth_map_shows_depths_and_gaps(tmp_path, axes):
    gap = row(language="ko", by_depth=[{"depth": 0.05, "n": 0, "exact": None}, *row()["by_depth"][1:]])
    assert plots.depth_map({"ours": [gap, row(), MIXED[2]]}, tmp_path / "x.png")
    (image,) = axes().images
    cells = image.get_array().tolist()
    assert cells[0] == [index / 10 for index in range(10)]
    assert cells[1][0] is None or math.isnan(cells[1][0])
    assert [text.get_text() for text in axes().get_yticklabels()] == ["en 3,000 (300x)", "ko 3,000 (300x)"]
    assert not plots.depth_map({"ours": [MIXED[2]]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
