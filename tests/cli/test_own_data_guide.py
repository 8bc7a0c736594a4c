"""The commands of docs/guides/own-data.md, one after the other."""

import re
import shlex
from pathlib import Path

import pytest
from own_cases import make_base, rows, write

from gistkern.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "own-data.md"


@pytest.fixture
def place(tmp_path):
    make_base(tmp_path / "base")
    write(tmp_path / "mine.jsonl", rows(20))
    write(tmp_path / "test.jsonl", rows(3, seed=1))
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "one.txt").write_text("The bell number 1 is with Mira.")
    return tmp_path


def test_the_page_from_top_to_bottom(place, monkeypatch, capsys):
    """In this process: tests/test_road.py walks such a page in fresh ones."""
    monkeypatch.chdir(place)
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), re.S)
    assert [kind for kind, _ in blocks] == ["bash", "bash", "python", "bash", "bash"]
    for kind, text in blocks:
        text = text.replace("--model NAME", "--model base --gists 2 --steps 4 --lora 4").replace("\\\n", " ")
        if kind == "python":
            exec(text, {})
        for line in text.splitlines() if kind == "bash" else ():
            name, *words = shlex.split(line, comments=True)
            assert name == "gistkern"
            main(words)
        assert capsys.readouterr().out
    assert (place / "answers.jsonl").exists()
    assert (place / "runs" / "mine-plain" / "config.json").exists()


def test_the_page_is_short_and_its_rows_are_rows(tmp_path):
    from gistkern.training.rows import read_rows

    text = PAGE.read_text()
    assert len(text.split()) <= 1000
    lines = re.findall(r"```json\n(.*?)```", text, re.S)
    (tmp_path / "x.jsonl").write_text("".join(lines))
    assert len(read_rows(tmp_path / "x.jsonl")) == 2
