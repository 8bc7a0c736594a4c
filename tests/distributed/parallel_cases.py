"""Layouts, inputs and launches of the tests of context parallelism, the same in every process."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from gistkern import GistLayout
from gistkern.testing import make_inputs

HERE = Path(__file__).parent


def _segments():
    return GistLayout.from_segments([30, 7, 41, 12, 25, 3, 18], 4, tail=19)


def _hierarchical():
    return GistLayout.hierarchical([20, 33, 9, 27, 14], 3, 5, tail=11, sink_tokens=2)


def _seeing():
    return GistLayout.hierarchical([20, 33, 9, 27, 14], 3, 5, tail=11, see_earlier_gists=True)


def _sliding():
    return GistLayout.sliding(160, 24, 16, gists=2)


def _packed():
    return GistLayout.pack([_segments(), GistLayout.from_segments([9, 22], [2, 3], tail=6), _hierarchical()])


def _ragged():
    """A batch with padding on the left, whose segments end at different rows."""
    return GistLayout.stack([GistLayout.from_segments([17, 20, 11, 8], 4, tail=9), _segments()])


def _long_segment():
    """Longer than a shard of four: its rows come from the rank before."""
    return GistLayout.from_segments([10, 60, 10], 4, tail=40)


LAYOUTS = {
    "segments": _segments,
    "hierarchical": _hierarchical,
    "hierarchical, seeing": _seeing,
    "sliding": _sliding,
    "packed": _packed,
    "ragged": _ragged,
    "long segment": _long_segment,
}


def layout_of(name):
    return LAYOUTS[name]()


def op_inputs(layout):
    return make_inputs(layout, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64)


def launch(script, processes, *arguments):
    """Run a script under torchrun and fail with what it said."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*torchrun, str(HERE / script), *map(str, arguments)],
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
