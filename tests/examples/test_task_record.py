"""Answers on disk and their table: nothing lost or read twice after a kill, nothing compared that cannot be."""

import gzip
import json

import pytest

from tasks.record import Record, read_record
from tasks.summary import markdown, read_folder, rows_of, show

RUN = {"model": "m", "dtype": "float32", "seed": 0, "squad": None, "method": "full"}


def line(item="a", method="full", ratio=1.0, task="squad", f1=1.0, **changed):
    made = {
        "task": task,
        "length": 0,
        "method": method,
        "ratio": ratio,
        "item": item,
        "scores": {"f1": f1, "exact": 0.0},
    }
    return made | {"tokens": 100, "rows": 25, "bytes": 50_000, "seconds": 0.5} | changed


def test_a_record_goes_on(tmp_path):
    path = tmp_path / "new" / "answers.jsonl.gz"
    Record(path, RUN).add([line("a"), line("b")])
    record = Record(path, RUN)
    assert record.done == {("squad", 0, "full", 1.0, "a"), ("squad", 0, "full", 1.0, "b")}
    record.add([line("서울")])
    text = [json.loads(one) for one in gzip.decompress(path.read_bytes()).decode().splitlines()]
    assert text == [RUN, line("a"), line("b"), line("서울")]  # any gzip reads it
    assert read_record(path)[:2] == (RUN, text[1:])


def test_every_torn_end_is_cut_off(tmp_path):
    path = tmp_path / "answers.jsonl.gz"
    record = Record(path, RUN)
    record.add([line("a")])
    whole = path.read_bytes()
    record.add([line("b"), line("c")])
    torn = path.read_bytes()
    for end in range(len(whole), len(torn)):
        path.write_bytes(torn[:end])
        found = Record(path, RUN)
        assert [one["item"] for one in found.lines] == ["a"]
        assert path.read_bytes() == whole
    found.add([line("b")])
    assert [one["item"] for one in Record(path, RUN).lines] == ["a", "b"]


def test_an_empty_file_is_begun(tmp_path):
    (tmp_path / "x").touch()
    assert Record(tmp_path / "x", RUN).lines == []
    assert read_record(tmp_path / "x")[0] == RUN


def test_damage_in_the_middle_is_told(tmp_path):
    path = tmp_path / "answers.jsonl.gz"
    Record(path, RUN).add([line("a")])
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged|no JSON|holds no answers"):
        Record(path, RUN)
    path.write_bytes(gzip.compress(json.dumps(RUN).encode() + b"\nnonsense\n"))
    with pytest.raises(ValueError, match="holds a line that is no JSON at byte 0"):
        Record(path, RUN)
    path.write_bytes(gzip.compress(json.dumps(RUN).encode())[:-3])
    with pytest.raises(ValueError, match="holds no answers: remove it"):
        Record(path, RUN)


def test_another_run_is_refused(tmp_path):
    Record(tmp_path / "x", RUN)
    with pytest.raises(ValueError, match="holds answers of another model and seed: choose another output folder"):
        Record(tmp_path / "x", {**RUN, "seed": 1, "model": "n"})


def test_rows_are_worked_out_by_hand():
    lines = [line("a", f1=1.0), line("b", f1=0.5, rows=15, seconds=1.5), line("c", f1=0.0), line("d", f1=0.5)]
    (row,) = rows_of(lines)
    assert (row["n"], row["score"], row["value"], row["also"]) == (4, "f1", 0.5, {"exact": 0.0})
    assert (row["tokens"], row["rows"], row["tokens_per_row"]) == (100, 22.5, 4.44)
    assert (row["bytes"], row["cpu_seconds"]) == (50_000, 0.75)
    # Wilson of 2 of 4, by hand: (0.5 + 0.48) / 1.96 -+ 1.96 sqrt(0.0625 + 0.06) / 1.96, with z^2 = 3.84
    assert (row["low"], row["high"]) == pytest.approx((0.15, 0.85), abs=1e-3)


def test_rows_of_one_task_stand_together_in_the_methods_order():
    lines = [
        line(method="bm25", ratio=16.0),
        line(task="vt"),
        line(method="none", ratio=0.0, rows=0, bytes=0),
        line(method="bm25", ratio=4.0),
        line(),
    ]
    found = [(row["task"], row["method"], row["ratio"]) for row in rows_of(lines)]
    assert found == [
        ("squad", "full", 1.0),
        ("squad", "none", 0.0),
        ("squad", "bm25", 4.0),
        ("squad", "bm25", 16.0),
        ("vt", "full", 1.0),
    ]


def test_a_folder_of_one_model(tmp_path, capsys):
    Record(tmp_path / "answers-full.jsonl.gz", RUN).add([line()])
    Record(tmp_path / "answers-none.jsonl.gz", {**RUN, "method": "none"}).add([line(method="none", rows=0)])
    runs, lines = read_folder(tmp_path)
    assert [run["method"] for run in runs] == ["full", "none"]
    rows = rows_of(lines)
    show(rows)
    assert "20.7 to 100.0" in capsys.readouterr().out
    head, _, full, none = markdown(rows).splitlines()
    assert full == "| squad | 100 | full | 4.0 | 25 | 50 | 0.50 | 1 | f1 | 100.0 | 20.7 to 100.0 | exact 0.0 |"
    assert none.split(" | ")[3] == "-"
    assert len({one.count("|") for one in (head, full, none)}) == 1
    Record(tmp_path / "answers-bm25.jsonl.gz", {**RUN, "model": "n"}).add([line(method="bm25")])
    with pytest.raises(ValueError, match="is of another model than what stands beside it"):
        read_folder(tmp_path)
