"""``make wheel``: one wheel for every Python and every torch from 2.10 on, for Linux systems from 2018 on.

Builds beside this torch, lets auditwheel judge that the library asks for nothing newer than manylinux_2_28, and tries
the wheel in a fresh environment, in front of the packages of this one. libtorch is not in it: it comes with torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLATFORM = f"manylinux_2_28_{platform.machine()}"
TRY = """
import pathlib, sys, torch
import gistkern
from gistkern import GistLayout, backends, gist_attention
from gistkern.backends import native
assert pathlib.Path(gistkern.__file__).is_relative_to(sys.prefix), gistkern.__file__
assert native.missing() is None, native.missing()
layout = GistLayout.from_segments([70, 90], 3, tail=40)
q, k, v = (torch.randn(1, heads, 206, 64) for heads in (4, 2, 2))
assert backends.choose("auto", q) == "cpu"
torch.testing.assert_close(gist_attention(q, k, v, layout), gist_attention(q, k, v, layout, backend="reference"))
print("the extension loads and computes what the reference does; CUDA kernels for", native.cuda_archs() or "no chip")
"""


def build(source: Path, folder: Path) -> Path:
    """The wheel of a checkout, as auditwheel has it."""
    environment = os.environ | {"GISTKERN_GLIBC": "2.28", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "plain"), str(source)]
    subprocess.run(build, check=True, env=environment)
    (plain,) = (folder / "plain").glob("*.whl")
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "--strip"]
    repair += ["--exclude", "libtorch*.so*", "--wheel-dir", str(folder / "dist"), str(plain)]
    subprocess.run(repair, check=True, env=environment)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def try_out(wheel: Path, folder: Path) -> None:
    """Install it into a fresh environment; import, compute, ask the doctor."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GISTKERN_LIBRARY")}
    venv.create(folder, clear=True, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, env=environment)  # a checkout on the path would be taken for an installed package
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for command in ([python, "-c", TRY], [folder / "bin" / "gistkern", "doctor"]):
        subprocess.run(command, check=True, cwd=folder, env=environment)


def main() -> None:
    """Build into dist/, and try it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = ROOT / "build" / "wheel"
    for stale in [folder, *(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist*")]:
        shutil.rmtree(stale, ignore_errors=True)  # setuptools packs whatever an earlier build left there
    wheel = build(ROOT, folder)
    try_out(wheel, folder / "environment")
    (ROOT / "dist").mkdir(exist_ok=True)
    made = wheel.replace(ROOT / "dist" / wheel.name)
    print(f"{made.relative_to(ROOT)}: {made.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
