"""docs/guides/own-data.md, beside what tests/test_pages.py runs."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "own-data.md"


def test_its_rows_are_rows(tmp_path):
    from gistkern.training.rows import read_rows

    text = PAGE.read_text()
    lines = re.findall(r"```json\n(.*?)```", text, re.S)
    (tmp_path / "x.jsonl").write_text("".join(lines))
    assert len(read_rows(tmp_path / "x.jsonl")) == 2
