"""The pages of the documentation do what they say: every block of Python and every command line of them runs.

A page is one run, top to bottom, in a folder of its own that holds what pages speak of (`place`). Python blocks share
their names. `gistkern ...` lines run in this process, smaller (`SMALLER`); what needs a process, a network, a GPU or an
hour says above its block who runs it instead, or why nobody can here:

    <!-- run by: tests/test_packaging.py -->
    <!-- not run: needs a GPU -->

A `text` block under `<!-- printed -->` is what the block of Python above it prints, character for character.
"""

import argparse
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from own_cases import make_base, rows, write
from page_cases import DOCS, LANGUAGES, PAGES, ROOT, blocks, commands, prose

from gistkern.cli import main as console
from gistkern.cli.main import main

WORDS, README_WORDS = 1500, 700
REASONS = {
    "needs a GPU",
    "needs several GPUs",
    "needs vLLM",
    "needs another library",
    "needs the network",
    "takes hours",
    "takes minutes",
    "needs an account",
}
# what a page's commands become, so that a tiny model walks them in seconds
SMALLER = {
    "--model NAME": "--model base --gists 2 --steps 4 --lora 4",
    "--segment-length 512": "--segment-length 12",
}


def relative(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a base model, rows, documents, and an adapter trained on them for four steps."""
    place = tmp_path_factory.mktemp("trained")
    make_base(place / "base", template="chatml")
    write(place / "mine.jsonl", rows(20))
    write(place / "chats.jsonl", rows(20, chat=True))
    write(place / "test.jsonl", rows(3, seed=1))
    (place / "documents").mkdir()
    for name, person in (("one.txt", "Mira"), ("two.txt", "Jonas")):
        (place / "documents" / name).write_text(f"The bell number 1 is with {person}.")
    model = ["--model", "base", "--gists", "2", "--steps", "4", "--lora", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        main(["train", "--data", "mine.jsonl", *model, "--output", "trained"])
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch, request):
    """A fresh working folder with what pages speak of.

    `base`, `mine.jsonl`, `chats.jsonl`, `test.jsonl`, `documents/{one,two}.txt`, and a run: `trained`, which is also
    `runs/mine` but on the page that trains that.
    """
    shutil.copytree(trained, tmp_path / "page")
    page = getattr(request.node, "callspec", None)
    if page is None or "--output runs/mine" not in page.params["page"].read_text("utf-8"):
        shutil.copytree(trained / "trained", tmp_path / "page" / "runs" / "mine")
    monkeypatch.chdir(tmp_path / "page")
    return tmp_path / "page"


def smaller(line):
    for long, short in SMALLER.items():
        line = line.replace(long, short)
    return line


def exists(line):
    """A command that is not run here names things that are there: a target of make, a module, a script."""
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables in front
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        return all(word in targets for word in words[1:] if "=" not in word and not word.startswith("-"))
    scripts = [word for word in words if word.endswith(".py")]
    modules = [
        words[i + 1]
        for i, word in enumerate(words[:-1])
        if word == "-m" and words[i + 1].startswith(("gistkern", "bench"))
    ]
    found = [ROOT / one for one in scripts if "/" in one]
    for name in modules:
        path = ROOT / name.replace(".", "/")
        found.append(path / "__main__.py" if path.is_dir() else path.with_suffix(".py"))
    if words[0] == "gistkern" or "gistkern" in modules:
        parsed(words[words.index("gistkern") + 1 :])
    return all(path.is_file() for path in found)


def parsed(words):
    """Its options are a command's, though nothing runs."""
    command, module = words[0], console.COMMANDS[words[0]][0]
    parser = argparse.ArgumentParser(prog=command, exit_on_error=False)
    sys.modules.get(module) or __import__(module)
    sys.modules[module].add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    assert not {word.split("=")[0] for word in words if word.startswith("--")} - known, words


@pytest.mark.parametrize(
    "page", [one for one in PAGES if {"python", "bash"} & {b.kind for b in blocks(one)}], ids=relative
)
def test_a_page_runs(page, place, capsys):
    names, printed = {"__name__": "__main__"}, ""
    for block in blocks(page):
        where = f"{relative(page)}:{block.line}"
        if block.printed:
            assert block.text.strip() == printed.strip(), where
        if block.runner:
            text = (ROOT / block.runner).read_text()
            assert relative(page).removeprefix("docs/") in text or all(
                line.split()[0] in text for line in commands(block.text)
            ), where
        if block.kind == "python":
            code = compile(block.text, where, "exec")
            if not (block.runner or block.reason):
                capsys.readouterr()
                exec(code, names)
                printed = capsys.readouterr().out
        for line in commands(block.text) if block.kind == "bash" else ():
            if block.runner or block.reason:
                assert exists(line), f"{where}: {line}"
                continue
            program, *words = shlex.split(smaller(line))
            assert program == "gistkern", f"{where}: {line}: run it, or say above the block who does"
            main(words)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_page_is_short_and_its_blocks_are_fenced(page):
    assert prose(page) <= (WORDS if page.name != "README.md" else README_WORDS)
    found = blocks(page)
    text = page.read_text("utf-8")
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.M))
    assert {block.kind for block in found} <= LANGUAGES
    assert {block.reason for block in found} <= REASONS | {""}
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    indented = [
        line
        for line in outside.splitlines()
        if re.match(r"(    ){1,2}(gistkern|python|pip|make|torchrun|accelerate|vllm|import|from) ", line)
    ]
    assert not indented, "a block without a fence"


def test_every_page_stands_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    pages = [str(path.relative_to(DOCS)) for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind)]
    assert sorted(re.findall(r"\S+\.(?:md|ipynb)", menu)) == sorted(pages)


def test_a_block_that_cannot_run_is_noticed(tmp_path, monkeypatch):
    """The reader of pages sees blocks, their runners and their commands."""
    page = tmp_path / "x.md"
    page.write_text(
        "a b\n\n<!-- not run: needs a GPU -->\n```bash\ngistkern ask \\\n  x  # y\n# z\n```\n"
        "\n```python\n1 / 0\n```\n| t |\n<!-- printed -->\n```text\n3\n```\n"
    )
    one, two, three = blocks(page)
    assert (one.kind, one.reason, commands(one.text)) == ("bash", "needs a GPU", ["gistkern ask    x"])
    assert (two.kind, two.line, two.runner) == ("python", 10, "")
    assert (three.printed, three.text, two.printed) == (True, "3\n", False)
    assert prose(page) == 2
    with pytest.raises(AssertionError):
        parsed(["ask", "--no-such-option"])
    assert not exists("make no-such-target")
    assert not exists("python examples/no_such.py")
    assert Path("x.md").name == page.name
