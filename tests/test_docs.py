"""Docstring examples run, and the documentation's links lead somewhere."""

import ast
import doctest
import importlib
import re
import shutil
from collections import Counter
from pathlib import Path

import griffe
import pytest
import torch
from own_cases import make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import gistkern
from gistkern.cli.main import COMMANDS
from gistkern.cli.parser import Parser

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs/reference"
# the packages whose public names stand in the reference; gistkern.serving needs vLLM, so they are read, not imported
PUBLIC = (
    "gistkern",
    *(f"gistkern.{name}" for name in ("demo", "training", "serving", "distributed", "memory", "testing")),
)
# a name that its module has too is named by its place, and a layout's constructors are functions of the schemes
ELSEWHERE = {"gistkern.memory.needs.needs": "gistkern.memory.needs"}
_SCHEMES = ("from_input_ids", "from_segments", "sliding", "hierarchical", "decode")
CONSTRUCTORS = [*(f"gistkern.layout.schemes.{name}" for name in _SCHEMES), "gistkern.layout.sharing.shared_segments"]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "gistkern").rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What examples call "runs/mine": two layers with gist rows, a tokenizer and its chat template."""
    folder = tmp_path_factory.mktemp("trained")
    make_base(folder, template="chatml")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    gistkern.patch(model, tokenizer, num_gist_tokens=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a Trainer without a folder makes one where it stands
    shutil.copytree(trained, tmp_path / "runs/mine")
    public = {name: getattr(gistkern, name) for name in gistkern.__all__}
    names = {"torch": torch, "gistkern": gistkern, **public}
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(importlib.import_module(name), extraglobs=names, optionflags=flags)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    """Of the root's files: those of docs/ and their anchors are checked by ``make docs``."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def public_names(package):
    """Of its table of exports, or its `__all__`, as they stand in the source."""
    path = ROOT / package.replace(".", "/")
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("_EXPORTS", "__all__"):
            return [f"{package}.{name}" for name in ast.literal_eval(node.value)]
    raise AssertionError(f"{package} has no public names")


def test_each_public_name_stands_on_one_reference_page():
    stated = Counter()
    for page in REFERENCE.rglob("*.md"):
        stated.update(ELSEWHERE.get(name, name) for name in re.findall(r"^::: (\S+)", page.read_text(), re.M))
    for name in CONSTRUCTORS:
        assert stated.pop(name) == 1
        assert hasattr(gistkern.GistLayout, name.rpartition(".")[2])
    wanted = {name for package in PUBLIC for name in public_names(package)}
    assert len(wanted) > 60
    assert stated == Counter(wanted)


def test_each_public_name_has_an_example():
    package = griffe.load("gistkern", search_paths=[ROOT])
    by_page = {reference: name for name, reference in ELSEWHERE.items()}
    names = [name for package in PUBLIC for name in public_names(package)]
    without = []
    for name in [*names, *CONSTRUCTORS]:
        thing = package[by_page.get(name, name).removeprefix("gistkern.")]
        if thing.is_attribute:  # a constant, or patch_llama, another name of patch
            continue
        if "\nExamples\n---" not in (thing.docstring.value if thing.docstring else ""):
            without.append(name)
    assert not without


def test_the_house_names_every_folder_in_the_order_of_imports():
    from test_imports import ORDER

    table = (ROOT / "docs/internals/house.md").read_text().split("## Beside the package")[0]
    rows = [re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    told = [name for row in rows for name in row]
    rank = {name: place for place, names in enumerate(ORDER) for name in names}
    assert sorted(told) == sorted(rank)
    assert [rank[name] for name in told] == sorted(rank.values())


def test_pages_that_the_package_names_are_there():
    text = "\n".join(path.read_text() for path in (ROOT / "gistkern").rglob("*.py"))
    named = set(re.findall(r"docs/[a-z0-9/-]+\.md", text))
    assert len(named) > 10
    assert not [page for page in named if not (ROOT / page).is_file()]


def test_each_quoted_message_is_one_of_the_source():
    """The page writes … for what differs from case to case."""
    said = []
    for path in (ROOT / "gistkern").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                said.append("".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values))
    quoted = re.findall(r"^\| `([^`]+)` \|", (REFERENCE / "errors.md").read_text(), re.M)
    assert len(quoted) >= 40
    assert not [message for message in quoted if not any(one.startswith(message) for one in said)]


def test_the_commands_options_are_those_of_the_page():
    sections = re.split(r"^## ", (REFERENCE / "commands.md").read_text(), flags=re.M)
    told = {
        title.split("\n")[0].removeprefix("gistkern "): set(
            re.findall(r"`(-*\w[\w-]*)[^`]*`", " ".join(re.findall(r"^\| (`.*?) \|", title, re.M)))
        )
        for title in sections
        if title.startswith("gistkern ")
    }
    for name, (module, _) in COMMANDS.items():
        parser = Parser(prog=name, add_help=False)
        importlib.import_module(module).add_arguments(parser)
        assert told.pop(name) == {word for action in parser._actions for word in action.option_strings or [action.dest]}
    assert not told


def test_no_environment_variable_is_missing_in_the_configuration():
    page = (REFERENCE / "configuration.md").read_text()
    read = set()
    for folder in ("gistkern", "kernels", "csrc"):
        for path in [one for end in ("py", "cpp", "h", "inc") for one in (ROOT / folder).rglob(f"*.{end}")]:
            read |= set(re.findall(r"""["'](GISTKERN_[A-Z_]+)["']""", path.read_text()))
    told = set(re.findall(r"^\| `(GISTKERN_[A-Z_]+)`", page, re.M))
    assert len(read) > 5
    assert told == read


def test_every_promise_names_a_test():
    promises = (ROOT / "docs/internals/reliability.md").read_text()
    named = set(re.findall(r"`(tests/[^`]+)`", promises))
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).is_file()]
    rows = [line for line in promises.splitlines() if line.startswith("|") and "---" not in line]
    assert all("`" in row.split("|")[2] or "the same" in row or "shown by" in row for row in rows)


def test_the_table_of_families_is_the_rows():
    from bench import families
    from bench.fill import filled

    page = (ROOT / "docs/reference/families.md").read_text()
    assert filled(page, families.tables()) == page, "run python -m bench.pages"
