"""The commands of docs/guides/own-data.md, one after the other, in a shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from own_cases import make_base, rows, write

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "own-data.md"


@pytest.fixture
def place(tmp_path):
    make_base(tmp_path / "base")
    write(tmp_path / "mine.jsonl", rows(20))
    write(tmp_path / "test.jsonl", rows(3, seed=1))
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "one.txt").write_text("The bell number 1 is with Mira.")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gistkern").write_text(f'#!/bin/sh\nexec {sys.executable} -m gistkern "$@"\n')
    (tmp_path / "bin" / "gistkern").chmod(0o755)
    return tmp_path


@pytest.mark.slow
def test_the_page_from_top_to_bottom(place):
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE.read_text(), re.S)
    assert [kind for kind, _ in blocks] == ["bash", "bash", "python", "bash", "bash"]
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for kind, text in blocks:
        text = text.replace("--model NAME", "--model base --gists 2 --steps 4 --lora 4")
        words = ["sh", "-ec", text] if kind == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(words, cwd=place, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert (place / "answers.jsonl").exists()
    assert (place / "runs" / "mine-plain" / "config.json").exists()


def test_the_page_is_short_and_its_rows_are_rows(tmp_path):
    from gistkern.training.rows import read_rows

    text = PAGE.read_text()
    assert len(text.split()) <= 1000
    lines = re.findall(r"```json\n(.*?)```", text, re.S)
    (tmp_path / "x.jsonl").write_text("".join(lines))
    assert len(read_rows(tmp_path / "x.jsonl")) == 2
