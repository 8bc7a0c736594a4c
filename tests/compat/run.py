"""``python tests/compat/run.py floor newest [--torch VERSION | --pinned-torch]``: the core under other versions.

Each environment is a folder under build/compat with the packages of ``floor.txt`` or ``newest.txt``, in front of
everything else that `make setup` installed; it is made once and used again until its list changes. PyPI's torch is
built for CUDA: the libraries of a gigabyte or two that it is linked to are not installed, empty ones stand in for
them, and no GPU is used.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# layout, attention, cache, patch, generate, compress, streaming, checkpoints, training steps
HF = (
    "acceptance",
    "cache",
    "cache_file",
    "compress",
    "generate",
    "patch",
    "plain_prefix",
    "checkpoint_rows",
    "streaming",
    "two_buffers",
    "families",
    "every_family",
)
TRAINER = (
    *("gradient_accumulation_changes_nothing", "a_plain_trainer_takes_the_batches_too", "a_full_checkpoint_comes_back"),
    *("evaluation_measures_the_answers", "an_adapters_checkpoint_holds_what_was_trained_and_comes_back"),
)
CORE = [
    *("tests/layout/test_layout.py", "tests/ops/test_attention.py"),
    *(f"tests/hf/test_{name}.py" for name in HF),
    *(f"tests/training/test_trainer.py::test_{name}" for name in TRAINER),
    # minutes of the fp64 oracle, and a random search that without the extension meets rows where the plain computation
    # errs by less than one rounding by luck, under every torch
    *("-k", "not several_chunks and not any_layout"),
]
VERSIONS = """
from importlib.metadata import version
from gistkern.backends import native
names = "transformers", "torch", "peft", "accelerate", "numpy"
print(*(f"{name} {version(name)}" for name in names), "no extension" if native.missing() else "extension", sep=", ")
"""
CUDA = "(?:cu|nv|nccl)"  # how the names of CUDA's libraries and functions begin


def main() -> None:
    """Make the environments, run the core in each; the exit code is the first that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["floor", "newest"])
    torch = parser.add_mutually_exclusive_group()
    torch.add_argument("--torch", metavar="VERSION", help="this torch instead of the list's")
    torch.add_argument("--pinned-torch", action="store_true", help="the torch of constraints.txt: seconds, not minutes")
    arguments, pytest_arguments = parser.parse_known_args()
    for name in arguments.names:
        wanted = requirements(HERE / f"{name}.txt", arguments.torch, arguments.pinned_torch)
        run(environment(name, wanted), pytest_arguments)


def requirements(file: Path, torch: str | None = None, pinned_torch: bool = False) -> list[str]:
    """The pins of a list, with another torch, or without one."""
    pins = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    if torch is None and not pinned_torch:
        return pins
    return [*([f"torch=={torch}"] if torch else []), *(pin for pin in pins if not pin.startswith("torch=="))]


def environment(name: str, wanted: list[str]) -> Path:
    """The Python of an environment with these packages, made unless it is there."""
    pinned = [pin for pin in wanted if pin.startswith("torch==")]
    folder = ROOT / "build" / "compat" / "-".join([name, *(pin.replace("==", "") for pin in pinned)])
    python, stamp, listed = folder / "bin" / "python", folder / "installed.txt", "\n".join(wanted) + "\n"
    if stamp.is_file() and stamp.read_text() == listed:
        return python
    print(f"making {folder.relative_to(ROOT)}: {' '.join(wanted)}", flush=True)
    venv.create(folder, clear=True, symlinks=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    install(python, *wanted)
    if pinned:
        (torch,) = importlib.metadata.distributions(name="torch", path=[str(site)])
        triton = [entry.split(";")[0] for entry in torch.requires or [] if entry.startswith("triton")]
        install(python, *triton, *stand_ins(site / "torch" / "lib"))
    # behind the environment's own packages stand those of the environment that this file runs in
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    stamp.write_text(listed)
    return python


def install(python: Path, *wanted: str) -> None:
    """Exactly these packages."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", *wanted]
    subprocess.run(pip, check=True)


def stand_ins(library: Path) -> list[str]:
    """Write empty CUDA libraries beside torch's own; the packages of the one that has to be real (the runtime's)."""
    owners: dict[str, str] = {}  # which library a version of a symbol belongs to
    symbols: dict[str, set[str]] = {}
    needed: set[str] = set()
    for file in library.glob("libtorch*.so*"):
        needed |= set(re.findall(rf"NEEDED.*\[(lib{CUDA}[^]]*)\]", output("readelf", "-d", file)))
        for part in re.split(r"File: ", output("readelf", "-V", file))[1:]:
            owners |= dict.fromkeys(re.findall(r"Name: (\S+)", part), part.split()[0])
        undefined = output("nm", "-D", "--undefined-only", file)
        for name, version in re.findall(rf"U ({CUDA}\w*)(?:@(\S+))?$", undefined, re.MULTILINE):
            symbols.setdefault(version, set()).add(name)
    runtime = next(name for name in needed if name.startswith("libcudart"))
    for name in needed - {runtime}:
        write_library(
            library / name, {version: found for version, found in symbols.items() if owners.get(version) == name}
        )
    write_library(library / "libnccl.so.2", {"": symbols.get("", set())})  # the only one without versions
    major = runtime.rpartition(".")[2]
    return ["nvidia-cuda-runtime-cu12" if major == "12" else f"nvidia-cuda-runtime=={major}.*"]


def write_library(path: Path, symbols: dict[str, set[str]]) -> None:
    """A shared library of these functions, by version; none of them is ever called."""
    script = path.with_suffix(".map")
    script.write_text(
        "".join(f"{version} {{ {';'.join(names)}; }};\n" for version, names in symbols.items() if version)
    )
    versioned = [f"-Wl,--version-script={script}"] if script.stat().st_size else []
    source = "".join(f"void {name}(void) {{}}\n" for names in symbols.values() for name in names)
    command = [
        os.environ.get("CXX", "c++"),
        "-shared",
        "-fPIC",
        "-fno-builtin",
        "-o",
        str(path),
        f"-Wl,-soname,{path.name}",
        *versioned,
    ]
    subprocess.run([*command, "-x", "c", "-"], input=source, text=True, check=True)


def output(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def run(python: Path, pytest_arguments: list[str]) -> None:
    """The core's tests; no GPU, whose libraries are stand-ins."""
    changed = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "-n", "auto", "--dist", "loadgroup", *CORE, *pytest_arguments]
    for arguments in (["-c", VERSIONS], pytest):
        code = subprocess.run([str(python), *arguments], cwd=ROOT, env=os.environ | changed).returncode
        if code:
            raise SystemExit(code)


if __name__ == "__main__":
    main()
