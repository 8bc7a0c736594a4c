"""The scripts of docs/guides/trainers.md run, and the package costs nothing until it is used."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_scripts_of_the_page_run(tmp_path, monkeypatch, capsys):
    """Every block of Python of the page, in one namespace, top to bottom."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```py(?:thon)?\n(.*?)```", (ROOT / "docs" / "guides" / "trainers.md").read_text(), re.S)
    assert len(blocks) == 6
    namespace = {}
    exec(compile(blocks[0], "docs/guides/trainers.md", "exec"), namespace)
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "answer" in entry] == [1, 2, 3, 4, 5]
    for block in blocks[1:]:
        exec(compile(block, "docs/guides/trainers.md", "exec"), namespace)
    said = capsys.readouterr().out
    assert "'reconstruction'" in said
    assert "'generation_exact'" in said
    assert list(Path("run").glob("checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import gistkern.training", {"torch", "transformers", "accelerate"}),
        ("from gistkern.training import Curriculum, Stage", {"torch", "transformers", "accelerate"}),
    ],
)
def test_imports_are_as_light_as_their_use(statement, absent):
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & absent


def test_few_files_need_the_trainer():
    needing = set()
    for path in (ROOT / "gistkern" / "training").glob("*.py"):
        names = [alias.name for node in ast.walk(ast.parse(path.read_text())) for alias in getattr(node, "names", ())]
        needing |= {path.name for name in names if name.startswith("Trainer")}
    assert needing == {"trainer.py", "callback.py", "finetune.py"}


def test_public_names_and_no_others():
    import gistkern.training as package

    assert set(package.__all__) == set(package._EXPORTS)
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        package.Trainer  # noqa: B018
