"""The package of training costs nothing until it is used, and names what is in it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
