"""gistkern ask --demo: a table of three ways, and what is said where it cannot run."""

import re

import pytest

from gistkern import demo
from gistkern.cli.main import main


def error_of(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["ask", *words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def rows_of(text):
    """The table's rows by what is kept; the answer is what stands in front of the verdict."""
    found = re.findall(
        r"^ *(gist rows|full cache|no context) +([\d,]+) +([\d,]+) +(\S+)(?: s)? +([\d.]+) s +(.*?) +(yes|no) *$",
        text,
        re.M,
    )
    return {name: (int(rows.replace(",", "")), int(size.replace(",", "")), *rest) for name, rows, size, *rest in found}


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(demo, "key", lambda: "80275")
    main(["ask", "--demo", "tiny"])
    said, waits = capsys.readouterr()
    assert "the pass key is 80275" in " ".join(said.split())
    rows = rows_of(said)
    assert list(rows) == ["gist rows", "full cache", "no context"]
    assert rows["gist rows"][:2] == (10, 20_480)
    assert rows["gist rows"][-2:] == ("80275", "yes")
    tokens, full = rows["full cache"][:2]
    assert full == tokens * 2_048
    assert f"{tokens:,} tokens are read" in said
    assert f"in place of {tokens:,}: {tokens / 10:,.0f} times fewer bytes" in " ".join(said.split())
    assert rows["no context"][:3] == (0, 0, "-")
    assert rows["no context"][-1] == "no"
    assert max(map(len, said.splitlines())) <= 100
    assert re.search(r"^loading tiny \.\.\. \d+\.\d s$", waits, re.M)


def test_without_a_name_the_best_one_that_is_there_is_taken(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("gistkern.cli.three_ways.three_ways", lambda name, *rest: asked.append(name) or 1 / 0)
    for lacking in (["pip install gguf"], []):
        monkeypatch.setattr(demo, "missing", lambda name, them=lacking: [] if name == "tiny" else them)
        with pytest.raises(ZeroDivisionError):
            main(["ask", "--demo"])
        said = capsys.readouterr().out
        assert ("This is the tiny model. For SmolLM2-135M first: pip install gguf" in said) == bool(lacking)
    assert asked == ["tiny", "smollm2"]


def test_what_it_cannot_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "missing", lambda name: ["pip install gguf"])
    assert "needs more packages: pip install gguf" in error_of(capsys, "--demo", "smollm2")
    assert "choose from" in error_of(capsys, "--demo", "llama")
    for more in (["--model", "m"], ["--4bit"], ["--dtype", "float16"]):
        assert "--demo brings its page, question and model" in error_of(capsys, "--demo", "tiny", *more)
    for words in ([], [str(tmp_path)], [str(tmp_path), "one.txt"]):
        assert "STORE NAME QUESTION are needed, or --demo alone" in error_of(capsys, *words)
