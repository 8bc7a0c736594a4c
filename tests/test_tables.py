"""Tables: at most 100 columns, no value lost, the same cells as Markdown; and who is shown bars."""

import random
import sys

import pytest

from gistkern import progress
from gistkern.tables import WIDEST, as_markdown, as_text, nbytes_said


def drawn(seed, columns, longest):
    rng = random.Random(seed)
    rows = [[f"{rng.randrange(10 ** rng.randint(1, 6)):,}" for _ in range(columns - 1)] for _ in range(5)]
    return [f"column {n}" for n in range(columns)], [
        [f"a row of {'many ' * longest}{i} words", *r] for i, r in enumerate(rows)
    ]


@pytest.mark.parametrize("terminal", [None, "40", "80", "300"])
@pytest.mark.parametrize(("columns", "longest"), [(2, 0), (6, 3), (8, 9), (9, 30)])
def test_a_table_fits_and_loses_nothing(monkeypatch, terminal, columns, longest):
    monkeypatch.delenv("COLUMNS", raising=False)
    if terminal:
        monkeypatch.setenv("COLUMNS", terminal)
    head, rows = drawn(columns, columns, longest)
    said = as_text(head, rows, title="numbers")
    assert max(map(len, said.splitlines())) <= WIDEST
    assert said.startswith("numbers\n")
    words = said.split()
    for row in rows:
        assert not [word for cell in row for word in cell.split() if word not in words]
    assert all(name.replace(" ", "") in said.replace(" ", "") for name in head)


def test_a_cell_wider_than_the_page_is_folded():
    said = as_text(["a", "b"], [["x" * 150, "y" * 90]])
    assert max(map(len, said.splitlines())) <= WIDEST
    assert (said.count("x"), said.count("y")) == (150, 90)


def test_numbers_end_at_the_right_and_markup_is_text():
    lines = as_text(["", "n"], [["[bold]one[/bold]", "1"], ["two", "1,000"]]).splitlines()
    assert lines[2:] == ["[bold]one[/bold]      1", "two               1,000"]


def test_a_terminal_without_unicode_gets_ascii(monkeypatch):
    class Latin:
        encoding = "latin-1"

    monkeypatch.setattr(sys, "stdout", Latin())
    assert as_text(["", "n"], [["one", "1"]]).isascii()


def test_markdown_holds_the_same_cells():
    head, rows = drawn(3, 4, 1)
    lines = as_markdown(head, [*rows, ["a|b", "1", "2", "3"]]).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: |"
    assert [line.strip("| ").split(" | ") for line in lines[2:-1]] == rows
    assert lines[-1].startswith("| a\\|b |")


def test_bytes_are_said_in_the_unit_that_suits_them():
    assert nbytes_said(999_949) == "999.9 kB"
    assert nbytes_said(999_951) == "1.0 MB"
    assert nbytes_said(8.03e9) == "8.0 GB"
    assert nbytes_said(0) == "0 B"


@pytest.mark.parametrize(("terminal", "rank", "shown"), [(True, None, True), (False, None, False), (True, "1", False)])
def test_bars_and_waits_are_for_the_first_process_of_a_terminal(monkeypatch, capsys, terminal, rank, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    progress.announce("loading the model")
    with progress.bar(total=3, desc="answering") as bar:
        bar.update(3)
    with progress.bar(True, total=3, desc="hidden") as bar:
        bar.update(3)
    said = capsys.readouterr().err
    assert ("loading the model ...\n" in said) == ("answering: " in said) == shown
    assert "hidden" not in said
