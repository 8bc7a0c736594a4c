"""Scripts under torchrun, for tests that need several processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(processes):
    """The beginning of a command; without "--" torchrun takes a script's --run for an option of its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]


def launch(script, processes, *arguments):
    """Run a script, which may import what lies beside it, and fail with what it said."""
    path = os.pathsep.join([str(Path(script).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*torchrun(processes), str(script), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    try:
        _, said = process.communicate(timeout=500)
    finally:
        process.terminate()  # torchrun takes its workers along, which a kill would leave behind
    assert process.returncode == 0, said[-4000:]
