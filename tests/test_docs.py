"""Docstring examples run, and the documentation's links lead somewhere."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "gistkern").rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a Trainer without a folder makes one where it stands
    import torch

    import gistkern

    names = {"torch": torch, **{public: getattr(gistkern, public) for public in gistkern.__all__}}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/guides/*.md")]), ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_promise_names_a_test():
    promises = (ROOT / "docs/internals/reliability.md").read_text()
    named = set(re.findall(r"`(tests/[^`]+)`", promises))
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).is_file()]
    rows = [line for line in promises.splitlines() if line.startswith("|") and "---" not in line]
    assert all("`" in row.split("|")[2] or "the same" in row or "shown by" in row for row in rows)


def test_the_readmes_families_are_the_rows():
    from bench import families
    from bench.fill import filled

    page = (ROOT / "README.md").read_text()
    assert filled(page, families.tables()) == page, "run python -m bench.pages"


def test_readme_python_runs(tmp_path, monkeypatch):
    """Every ```python block of the README, in one namespace, top to bottom."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
