import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def command(*arguments):
    """The smallest training run of the example."""
    return [sys.executable, str(EXAMPLES / "train_niah.py"), "--preset", "smoke", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder of such a run by one process, and what it said; tests that use it share an xdist group."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = run("--run", folder)
    assert done.returncode == 0, done.stderr
    return folder, done
