"""Compile the extension: which compilers there are, what is compiled how, one shared library.

    python csrc/build_extension.py --out gistkern/_C.so                    # what `pip install` does (setup.py)
    python csrc/build_extension.py --cuda emulated --out build/_C.so       # the CUDA kernels on the CPU, for tests

Standard library only: setup.py imports it before anything is installed. The library holds no Python and uses libtorch's
stable ABI alone, so one file serves every Python, and CPU and CUDA builds of torch >= 2.10 (extension.md).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ARCHS", "SANITIZERS", "build", "cuda_home", "cuda_include", "cxx", "missing", "nvcc"]

SOURCE = Path(__file__).resolve().parent
# every chip of kernels/chips.py that NVIDIA makes; GISTKERN_CUDA_ARCHS replaces the list
ARCHS = ("80", "86", "89", "90a", "100", "120")
# the oldest torch that the library works with, whichever newer one it is compiled beside
TORCH = (2, 10)
SANITIZERS = ("address,undefined", "thread")

TORCH_SOURCES = ("bindings", "launcher", "planned", "older_systems")
CPU_SOURCES = ("instruction_set", "launch_attention", "launch_compact", "launch_decode")
CUDA_SOURCES = ("compact", "decode")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512")


@dataclass(frozen=True)
class _Step:
    """One compilation: the command without its output."""

    name: str
    command: tuple[str, ...]


def cxx() -> str | None:
    """The C++ compiler: ``CXX`` (a program, no flags), else the first of g++, clang++, c++ on the path."""
    wanted = os.environ.get("CXX")
    return wanted or next((found for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), None)


def cuda_home() -> Path | None:
    """The CUDA toolkit: ``CUDA_HOME``, the folder of nvcc on the path, or PyPI's nvidia-cuda-nvcc."""
    if wanted := os.environ.get("CUDA_HOME"):
        return Path(wanted)
    if found := shutil.which("nvcc"):
        real = Path(found).resolve()
        # a wrapper script on the path says nothing about where the toolkit is; nvcc itself does
        said = subprocess.run([found, "--dryrun", "-E", "x.cu"], capture_output=True, text=True).stderr
        tops = [line.split("TOP=")[1].strip() for line in said.splitlines() if "TOP=" in line]
        return Path(tops[0]).resolve() if tops else real.parents[1]
    return next((home for home in _pypi_homes() if (home / "bin" / "nvcc").is_file()), None)


def _pypi_homes() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    return [home for root in roots for home in sorted(root.glob("cu[0-9]*"), reverse=True)]


def nvcc() -> Path | None:
    """The CUDA compiler; None where there is none, or ``GISTKERN_CUDA_ARCHS=none`` asks for CPU kernels only."""
    if os.environ.get("GISTKERN_CUDA_ARCHS") == "none":
        return None
    home = cuda_home()
    found = home / "bin" / "nvcc" if home else None
    return found if found and found.is_file() else None


def cuda_include() -> Path | None:
    """The folder with NVIDIA's own headers (the emulator uses them too), or None."""
    home = cuda_home()
    candidates = [home / "include"] if home else []
    candidates += [home / "include" for home in _pypi_homes()]
    return next((folder for folder in candidates if (folder / "cuda_bf16.h").is_file()), None)


def _torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")  # found, not imported: importing takes seconds
    return Path(spec.origin).parent if spec and spec.origin else None


def missing() -> str | None:
    """Why the extension cannot be built here, or None."""
    if os.environ.get("GISTKERN_NO_EXTENSION") == "1":
        return "GISTKERN_NO_EXTENSION=1 asks for a build without it"
    if platform.system() != "Linux":
        return f"it is built on Linux, this is {platform.system()}"
    if cxx() is None:
        return "there is no C++ compiler (g++, clang++ or c++ on the path, or CXX)"
    if shutil.which(cxx() or "") is None:
        return f"CXX names no program: {cxx()}"
    if _torch_folder() is None:
        return (
            "torch is not visible to the build (build isolation hides it): install torch, then gistkern with "
            "`pip install --no-build-isolation`"
        )
    found = importlib.metadata.version("torch")
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < TORCH:
        return f"it needs torch >= {TORCH[0]}.{TORCH[1]} (libtorch's stable ABI), found {found}"
    return None


def cuda_archs() -> tuple[str, ...]:
    """``GISTKERN_CUDA_ARCHS`` (``80;90a``), else `ARCHS`."""
    wanted = os.environ.get("GISTKERN_CUDA_ARCHS")
    return tuple(arch.strip() for arch in wanted.split(";") if arch.strip()) if wanted else ARCHS


def _host_flags(include: Path | None = None) -> tuple[str, ...]:
    folders = [SOURCE, SOURCE / "include", *([include] if include else [])]
    return (
        *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"),
        *(flag for folder in folders for flag in ("-I", str(folder))),
    )


def _sanitizer_flags(sanitizer: str | None) -> tuple[str, ...]:
    if sanitizer is None:
        return ()
    return (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")


def _cpu_steps(compiler: str, narrow_avx512: bool, flags: tuple[str, ...]) -> list[_Step]:
    common = (compiler, "-std=c++17", *_host_flags(), *flags)
    sets = {"baseline": ("4", ())}
    if platform.machine() in ("x86_64", "AMD64"):
        sets |= {"avx2": ("8", _AVX2), "avx512": ("16", _AVX2 if narrow_avx512 else _AVX512)}
    steps = [
        _Step(
            f"kernels_{name}",
            (
                *(*common, "-O1" if flags else "-O3", *target, f"-DGISTKERN_ISA={name}", f"-DGISTKERN_LANES={lanes}"),
                # GCC's own AVX-512 headers start from undefined registers
                *(("-Wno-maybe-uninitialized",) if name == "avx512" else ()),
                *("-c", str(SOURCE / "cpu" / "kernels.cpp")),
            ),
        )
        for name, (lanes, target) in sets.items()
    ]
    defines = ("-DGISTKERN_NARROW_AVX512",) if narrow_avx512 else ()
    steps += [
        _Step(name, (*common, "-O2", *defines, "-c", str(SOURCE / "cpu" / f"{name}.cpp"))) for name in CPU_SOURCES
    ]
    return steps


def _nvcc_steps(compiler: Path, host: str) -> list[_Step]:
    archs = cuda_archs()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # machine code for the listed chips, and PTX of the last one that later chips can translate
    portable = [arch for arch in archs if arch.isdigit()]
    targets += [f"-gencode=arch=compute_{portable[-1]},code=compute_{portable[-1]}"] if portable else []
    command = (str(compiler), "-std=c++17", "-O3", "-ccbin", host, "--threads", "0", *targets)
    hidden = ("-Xcompiler", "-fPIC,-fvisibility=hidden", "-I", str(SOURCE / "include"))
    return [_Step(f"cuda_{name}", (*command, *hidden, "-c", str(SOURCE / f"{name}.cu"))) for name in CUDA_SOURCES]


def emulated_steps(compiler: str, flags: tuple[str, ...] = ()) -> list[_Step]:
    """The CUDA kernels compiled by the C++ compiler against csrc/testing, with `flags` (sanitizers)."""
    include = cuda_include()
    if include is None:
        raise SystemExit("the emulator needs NVIDIA's headers: install CUDA, or `pip install nvidia-cuda-runtime`")
    common = (compiler, "-std=c++17", "-O2", "-g1", "-DGISTKERN_EMULATED", *_host_flags(include), *flags)
    common = (*common, "-I", str(SOURCE / "testing"), "-Wno-unknown-pragmas", "-Wno-unused-parameter")
    steps = [_Step(f"emulated_{n}", (*common, "-x", "c++", "-c", str(SOURCE / f"{n}.cu"))) for n in CUDA_SOURCES]
    return [*steps, _Step("emulator", (*common, "-c", str(SOURCE / "testing" / "emulator.cpp")))]


def _torch_steps(compiler: str, cuda: str, flags: tuple[str, ...]) -> list[_Step]:
    folder = _torch_folder()
    assert folder is not None, "missing() has been asked"
    defines = []
    if cuda != "none":
        defines.append(f'-DGISTKERN_WITH_CUDA="{"emulated" if cuda == "emulated" else ";".join(cuda_archs())}"')
    if cuda == "emulated":
        defines.append("-DGISTKERN_EMULATED")
    # torch's headers offer what this version of the stable ABI has
    defines.append(f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000ULL")
    options = ("-std=c++20", "-O2", *_host_flags(), "-isystem", str(folder / "include"), *defines, *flags)
    return [_Step(name, (compiler, *options, "-c", str(SOURCE / f"{name}.cpp"))) for name in TORCH_SOURCES]


def build(out: Path, cuda: str = "nvcc", narrow_avx512: bool = False, sanitizer: str | None = None) -> None:
    """Compile and link the library `out`.

    Parameters
    ----------
    out : Path
        The file to write; replaced in one step.
    cuda : str
        ``"nvcc"``, ``"none"``, or ``"emulated"``: the CUDA kernels compiled for the CPU (tests).
    narrow_avx512 : bool
        Compile the 16-lane CPU kernels for AVX2, so that a processor without AVX-512 can test them.
    sanitizer : str, optional
        One of `SANITIZERS`, for the bindings, the CPU kernels and the emulated ones.

    Raises
    ------
    subprocess.CalledProcessError
        If a compiler fails; it has said why.
    """
    compiler, folder = cxx(), _torch_folder()
    assert compiler is not None, "missing() has been asked"
    assert folder is not None, "missing() has been asked"
    flags = _sanitizer_flags(sanitizer)
    steps = [*_torch_steps(compiler, cuda, flags), *_cpu_steps(compiler, narrow_avx512, flags)]
    libraries = [str(folder / "lib" / "libtorch_cpu.so")]
    if cuda == "nvcc":
        home, found = cuda_home(), nvcc()
        assert home is not None, "nvcc() was found"
        assert found is not None, "nvcc() was found"
        steps = [*_nvcc_steps(found, compiler), *steps]  # the longest first
        static = next(home.rglob("libcudart_static.a"))
        libraries += [str(static), "-ldl", "-lrt", "-lpthread"]
    elif cuda == "emulated":
        steps += emulated_steps(compiler, flags)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        objects = compile_all(steps, Path(temporary))
        library = Path(temporary) / "library.so"
        command = [*_linker(compiler, cuda), "-shared", *flags, f"-Wl,--version-script={SOURCE / 'library.map'}"]
        subprocess.run([*command, *map(str, objects), *libraries, "-o", str(library)], check=True)
        partial = out.with_suffix(".partial")
        shutil.copy(library, partial)
        partial.replace(out)


def _linker(compiler: str, cuda: str) -> list[str]:
    """The compiler, or where ``GISTKERN_GLIBC=2.28`` asks for it the linker of PyPI's ziglang, which knows every glibc.

    Only the CUDA runtime, which is linked statically, calls functions that newer glibcs have by newer names.
    """
    glibc = os.environ.get("GISTKERN_GLIBC")
    if not glibc or cuda != "nvcc":
        return [compiler]
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libstdc++.so", "libgcc_s.so.1")
    ]
    target = f"{platform.machine()}-linux-gnu.{glibc}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", target, *runtimes, "-lm"]


def compile_all(steps: list[_Step], folder: Path) -> list[Path]:
    """Run the steps, as many at a time as there are processors; returns the object files."""

    def run(step: _Step) -> Path:
        target = folder / f"{step.name}.o"
        subprocess.run([*step.command, "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(run, steps))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cuda", choices=("auto", "nvcc", "none", "emulated"), default="auto")
    parser.add_argument("--narrow-avx512", action="store_true")
    parser.add_argument("--sanitizer", choices=SANITIZERS)
    parser.add_argument("--if-possible", action="store_true", help="where it cannot be built, say why and succeed")
    args = parser.parse_args(arguments)
    if reason := missing():
        print(f"the extension is not built: {reason}", file=sys.stderr)
        sys.exit(0 if args.if_possible else 1)
    cuda = ("nvcc" if nvcc() else "none") if args.cuda == "auto" else args.cuda
    build(args.out, cuda, args.narrow_avx512, args.sanitizer)


if __name__ == "__main__":
    main()
