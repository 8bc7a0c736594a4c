"""The `kernels/` trap: the folder is reachable as gistkern.kernels however the package is installed.

And it never is importable as `kernels`, a name that belongs to a PyPI package transformers probes for.
"""

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
import build_extension  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


def run(code, cwd, *path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(kind, source, target, **environment):
    """Without the extension unless the environment says otherwise: compiling takes a while."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(target), str(source)]
    environment = os.environ | {"GISTKERN_NO_EXTENSION": "1"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made, done.stderr + done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git would give a fresh clone, so that building leaves no trace in the checkout."""
    target = tmp_path_factory.mktemp("source") / "gistkern"
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


WHERE = "import gistkern, gistkern.kernels.chips as c; print(gistkern.__file__); print(c.__file__)"


def check_wheel(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "gistkern/kernels/chips.py" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "examples/", "bench/"))]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    package, kernel = run(WHERE, tmp_path, site).splitlines()
    assert Path(package) == site / "gistkern" / "__init__.py"
    assert Path(kernel) == site / "gistkern" / "kernels" / "chips.py"


def test_wheel(source, tmp_path):
    wheel, said = build("wheel", source, tmp_path / "dist")
    check_wheel(wheel, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "without the compiled extension: GISTKERN_NO_EXTENSION=1" in said


def test_a_machine_without_compilers_gets_a_pure_wheel(source, tmp_path):
    """And is told why. The path holds nothing; `python -m build` needs none of it."""
    wheel, said = build("wheel", source, tmp_path / "dist", GISTKERN_NO_EXTENSION="", PATH=str(tmp_path), CXX="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "without the compiled extension: there is no C++ compiler" in said


def test_a_wheel_with_the_extension_computes(source, tmp_path):
    """CPU kernels only: one library for every Python, found beside the package and used by default."""
    if reason := build_extension.missing():
        pytest.skip(f"the extension cannot be built here: {reason}")
    wheel, said = build("wheel", source, tmp_path / "dist", GISTKERN_NO_EXTENSION="", GISTKERN_CUDA_ARCHS="none")
    assert "-py3-none-linux_" in wheel.name
    assert "the extension gets CPU kernels only" in said
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import torch
from gistkern import GistLayout, backends, gist_attention
from gistkern.backends import native
assert native.library_path().parent.parent.name == "site" and not native.cuda_archs()
layout = GistLayout.from_segments([40], 2, tail=9)
q = torch.randn(1, 2, 51, 16)
assert backends.choose("auto", q) == "cpu"
out = gist_attention(q, q, q, layout)
torch.testing.assert_close(out, gist_attention(q, q, q, layout, backend="reference"))
print("equal")
"""
    assert run(code, tmp_path, site) == "equal"


def test_sdist_and_wheel_from_it(source, tmp_path):
    import tarfile

    archive, _ = build("sdist", source, tmp_path / "dist")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.glob("gistkern-*") if path.is_dir())
    assert (unpacked / "csrc" / "bindings.cpp").is_file()
    check_wheel(build("wheel", unpacked, tmp_path / "wheel")[0], tmp_path)


def test_editable_install_reads_the_checkout(tmp_path):
    package, kernel = run(WHERE, tmp_path).splitlines()
    assert Path(package) == ROOT / "gistkern" / "__init__.py", "make setup installs the checkout in editable mode"
    assert Path(kernel) == ROOT / "kernels" / "chips.py"


def test_running_from_the_root():
    assert run(WHERE, ROOT, ROOT).splitlines()[1] == str(ROOT / "kernels" / "chips.py")


def test_transformers_from_the_root_without_the_pypi_package():
    code = "import transformers.utils as u; from transformers import LlamaForCausalLM; print(u.is_kernels_available())"
    assert run(code, ROOT, ROOT) == "False"


def test_transformers_from_the_root_with_a_real_kernels_package(tmp_path):
    """A regular package anywhere on the path wins over our folder, which is no package."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("REAL = True\n")
    code = "import kernels; print(kernels.REAL); import gistkern.kernels.chips; import transformers"
    assert run(code, ROOT, ROOT, tmp_path) == "True"


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
