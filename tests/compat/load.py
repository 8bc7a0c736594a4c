"""``python tests/compat/load.py [TORCH ...]``: does the extension load beside each torch, and compute rightly?

Prints the table of docs/internals/wheels.md. Takes gigabytes of downloads, so each environment goes once it was asked.
"""

import os
import shutil
import subprocess
import sys

from run import ROOT, environment

TORCHES = ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
ASK = """
import torch
from gistkern import GistLayout, backends, gist_attention
from gistkern.backends import native
layout = GistLayout.from_segments([70, 90], 3, tail=40)
q, k, v = (torch.randn(1, heads, 206, 64, requires_grad=True) for heads in (4, 2, 2))
def gradients(backend):
    out = gist_attention(q, k, v, layout, backend=backend)
    return [out, *torch.autograd.grad(out.square().sum(), [q, k, v])]
served = backends.choose("auto", q)
apart = max((a - b).abs().max().item() for a, b in zip(gradients("auto"), gradients("reference")))
assert apart < 1e-4, apart
message = str(native.missing() or "loads")
print(f"{torch.__version__} | {message} | `{served}` | {apart:.1e}")
"""


def main() -> None:
    """Make each environment, ask, remove it."""
    print("| torch | the extension | a CPU call is served by | largest difference from the reference |", flush=True)
    print("| --- | --- | --- | ---: |", flush=True)
    for version in sys.argv[1:] or TORCHES:
        python = environment("load", [f"torch=={version}"])
        changed = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([python, "-c", ASK], env=os.environ | changed, capture_output=True, text=True)
        print(f"| {done.stdout.strip() or f'{version} | {done.stderr.strip().splitlines()[-1]} | |'} |", flush=True)
        shutil.rmtree(python.parents[1])


if __name__ == "__main__":
    main()
