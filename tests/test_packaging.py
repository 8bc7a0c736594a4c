"""The `kernels/` trap: the folder is reachable as gistkern.kernels however the package is installed.

And it never is importable as `kernels`, a name that belongs to a PyPI package transformers probes for.
"""

import email
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "csrc"), str(ROOT / "tests" / "compat")]
import build_extension  # noqa: E402
import make_wheel  # noqa: E402

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


SHIPPED = [
    str(path.relative_to(ROOT))
    for kind in ("page.txt", "tiny/*", "smollm2/*")
    for path in (ROOT / "gistkern" / "demo").glob(kind)
]


def check_wheel(file, tmp_path):
    names = zipfile.ZipFile(file).namelist()
    assert {"gistkern/kernels/chips.py", "gistkern/kernels/hopper/ring.py"} <= set(names)
    assert {"gistkern/demo/page.txt", *SHIPPED} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "examples/", "bench/"))]
    site = tmp_path / "site"
    zipfile.ZipFile(file).extractall(site)
    package, kernel = run(WHERE, tmp_path, site).splitlines()
    assert Path(package) == site / "gistkern" / "__init__.py"
    assert Path(kernel) == site / "gistkern" / "kernels" / "chips.py"
    said = run("from gistkern.cli.main import main; main(['ask', '--demo', 'tiny'])", tmp_path, site)
    assert re.search(r"gist rows +10 +20,480 ", said), "the demo's page and model are in the wheel"


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The sdist and the pure wheel made from it, as `python -m build` does by default: (folder, wheel, output)."""
    folder = tmp_path_factory.mktemp("made")
    archive, _ = build("sdist", source, folder / "sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.glob("gistkern-*") if path.is_dir())
    return unpacked, *build("wheel", unpacked, folder / "wheel")


def test_sdist_holds_what_a_build_needs(made):
    unpacked, *_ = made
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    sources = [*(ROOT / "csrc").glob("*.*"), *(ROOT / "kernels").rglob("*.py")]
    sources = [str(source.relative_to(ROOT)) for source in sources]
    assert not {name for name in sources if not name.endswith((".so", ".pyc"))} - held
    assert set(SHIPPED) <= held
    assert not [name for name in held if name.startswith(("tests/", "examples/", "bench/"))], "no tests that cannot run"


def test_wheel(made, tmp_path):
    _, file, said = made
    check_wheel(file, tmp_path)
    assert file.name.endswith("-py3-none-any.whl")
    assert "without the compiled extension: GISTKERN_NO_EXTENSION=1" in said


def test_metadata(made):
    """What a package index shows: links that lead somewhere, extras for what is in the wheel, typed code."""
    _, file, _ = made
    with zipfile.ZipFile(file) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_string(packed.read(name).decode())
        assert "gistkern/py.typed" in packed.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert set(metadata.get_all("Provides-Extra")) == {"triton", "train", "flash", "cuda", "dev"}
    assert {"torch", "tqdm", "pyyaml"} <= {re.split(r"[<>=]", one)[0] for one in metadata.get_all("Requires-Dist")}
    text = metadata.get_payload()
    assert "gistkern train --data" in text
    assert "![" not in text
    assert not re.findall(r"\]\((?!https?://|#)", text)


def test_a_machine_without_compilers_is_told_why_it_gets_none():
    """The path holds nothing; the wheel is then that of `test_wheel`."""
    code = "import build_extension; print(build_extension.missing())"
    environment = {**os.environ, "PATH": "", "CXX": "", "PYTHONPATH": str(ROOT / "csrc")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "there is no C++ compiler" in done.stdout


@pytest.mark.timeout(900)  # it compiles everything
def test_a_wheel_with_the_extension(source, tmp_path, monkeypatch):
    """As `make wheel` builds it, CPU kernels only: manylinux_2_28 for every Python, tried in a fresh environment."""
    if reason := build_extension.missing():
        pytest.skip(f"the extension cannot be built here: {reason}")
    monkeypatch.setenv("GISTKERN_CUDA_ARCHS", "none")
    made = make_wheel.build(source, tmp_path)
    assert made.name.endswith(f"-py3-none-{make_wheel.PLATFORM}.whl")
    make_wheel.try_out(made, tmp_path / "environment")


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
