"""Builds of CUDA sources for the CPU, under the emulator of csrc/testing."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from build_tools import CSRC, load_build

FLAGS = {
    "plain": ["-O2"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Function (sources under csrc/, sanitizer, *options) -> path of the program or library; one build a session.

    `sources` is a name or a tuple of them; each is compiled by itself, two at a time.
    """
    tools, built = load_build(), {}
    compiler, include = tools.cxx(), tools.cuda_include()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    if include is None:
        pytest.skip("needs NVIDIA's headers: CUDA_HOME, nvcc on the path, or PyPI's nvidia-cuda-runtime")

    def build(sources: tuple[str, ...], sanitizer: str, *options: str) -> Path:
        folder = tmp_path_factory.mktemp("emulated")
        command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", *FLAGS[sanitizer], *options]
        include_flags = ["-I", CSRC / "include", "-I", CSRC / "testing", "-isystem", include]

        def compiled(source: str) -> Path:
            target = folder / (source.replace("/", "_") + ".o")
            run([*command, "-x", "c++", "-c", CSRC / source, "-o", target, *include_flags])
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, (*sources, "testing/emulator.cpp")))
        run([*command, *objects, "-o", folder / "built"])
        return folder / "built"

    def run(command: list) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def get(sources: str | tuple[str, ...], sanitizer: str, *options: str) -> Path:
        key = ((sources,) if isinstance(sources, str) else sources, sanitizer, options)
        if key not in built:
            built[key] = build(*key[:2], *options)
        return built[key]

    return get
