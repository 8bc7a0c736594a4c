"""The native CPU kernels for every instruction set, and under the address sanitizer.

The suites themselves are tests/ops/test_attention.py and test_decode.py, here in a process per instruction set. A
test build compiles the 16-lane source for AVX2, so that a processor without AVX-512 runs it too.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_tools import load_build

from gistkern import GistLayout, gist_attention
from gistkern.backends import native
from gistkern.testing import make_inputs

ROOT = Path(__file__).parents[2]
FUZZ = "tests/csrc/fuzz.py"
X86 = platform.machine() in ("x86_64", "AMD64")
SETS = ("avx2", "avx512", "baseline") if X86 else ("baseline",)
CORE = "any_layout or (long_layouts and float32) or what_no_row_sees or (every_case and float16) or fills_the_named"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cpu_kernels")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Function (sanitizer or None) -> a CPU-only library with the 16-lane source compiled for AVX2."""
    tools, built = load_build(), {}
    if reason := tools.missing():
        pytest.skip(f"the extension cannot be built here: {reason}")

    def get(sanitizer):
        if sanitizer not in built:
            path = tmp_path_factory.mktemp("library") / "_C.so"
            tools.build(path, cuda="none", narrow_avx512=True, sanitizer=sanitizer)
            built[sanitizer] = path
        return built[sanitizer]

    return get


def run(arguments, library, **environment):
    environment = os.environ | {native.LIBRARY: str(library)} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# the other tests run the best that this processor has
OTHERS = [name for name in SETS if native.missing() is not None or name != native.instruction_set()]


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_instruction_sets_agree_with_the_oracle(name, library):
    check = f"from gistkern.backends import native; assert native.instruction_set() == {name!r}"
    chosen = run(["-c", check], library(None), GISTKERN_CPU_ISA=name)
    assert chosen.returncode == 0, chosen.stderr
    suites = ["tests/ops/test_attention.py", "tests/ops/test_decode.py", "tests/backends/test_cpu_fold.py"]
    suite = ["-m", "pytest", *suites, "-k", f"({CORE}) and not sdpa"]
    done = run([*suite, "-p", "no:xdist", "-p", "no:cacheprovider"], library(None), GISTKERN_CPU_ISA=name)
    assert done.returncode == 0, done.stdout[-3000:]


def _preload():
    """What a sanitized library needs in a process of python.

    A hostile size may ask for gigabytes: refused by a limit, or it would depend on the machine's free memory whether a
    call is refused or the process is killed.
    """
    names = [f"lib{name}.so" for name in ("asan", "ubsan")]
    found = [subprocess.run(["gcc", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    return {
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024",
    }


# exact allocations of odd sizes
SANITIZED = """
import sys, torch
sys.path.insert(0, "tests")
from gistkern import GistLayout, gist_attention
from gistkern.backends import cpu
from gistkern.kernels.arguments import AttentionArguments
from gistkern.testing import make_inputs
from pool_cases import CASES, check, make_case
for layout in (GistLayout.from_segments([37, 5, 70], 3, tail=9), GistLayout.sliding(150, 40, 16, gists=2),
               GistLayout.decode(torch.tensor([10, 0, 37]), torch.tensor([5, 20, 0]), rows=9)):
    for dim in (1, 7, 64, 72):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = make_inputs(layout, heads=6, kv_heads=2, head_dim=dim, dtype=dtype)
            out = gist_attention(x.q, x.k, x.v, layout, past_key=x.past_key, past_value=x.past_value, backend="cpu")
            torch.autograd.grad(out, list(x.leaves().values()), x.grad_out, allow_unused=True)
            q, k, v, *past = (t if t is None else t.detach() for t in (x.q, x.k, x.v, x.past_key, x.past_value))
            intervals = layout.gist_begin, layout.gist_end, layout.local_begin
            call = AttentionArguments(q, k, v, *cpu.compact(k, v, *past, layout.gather), *intervals, 0.3)
            cpu.folded_backward(call, layout.gather, x.grad_out, *cpu.forward(call))
for name, options in CASES.items():
    check(make_case(**options), "cpu")
print("finished")
"""
sanitized = pytest.mark.skipif(not X86, reason="the sanitizers' libraries are looked for as GCC on x86-64 names them")


@pytest.mark.sanitize
@pytest.mark.timeout(1800)
@sanitized
@pytest.mark.parametrize("name", SETS[:2])
def test_no_kernel_leaves_its_buffers(name, library):
    done = run(["-c", SANITIZED], library("address,undefined"), **_preload(), GISTKERN_CPU_ISA=name)
    assert "finished" in done.stdout, done.stderr[-3000:]


@pytest.mark.sanitize
@pytest.mark.timeout(1800)
@sanitized
def test_no_hostile_call_leaves_a_buffer(library):
    done = run([FUZZ, "--calls", "2000", "--compiled", "12"], library("address,undefined"), **_preload())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ERROR: AddressSanitizer" not in done.stderr
    assert "runtime error" not in done.stderr
    served, refused = (int(part.split()[1]) for part in done.stdout.strip().split(", "))
    assert min(served, refused) > 600


# one check of each family left out: the fuzz must then see a kernel leave its buffers
PLANTED = {
    "attention": ("& (end[row] <= gist_rows)", ""),
    "decode": (" || named >= buffers.pages", ""),
    "compact": (" || slot >= pool_rows", ""),
}


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory):
    """A sanitized library of a copy of csrc/ without those checks."""
    copy = tmp_path_factory.mktemp("unchecked") / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    bounds = copy / "cpu" / "bounds.h"
    text = bounds.read_text()
    for check, nothing in PLANTED.values():
        assert text.count(check) == 1
        text = text.replace(check, nothing)
    bounds.write_text(text)
    load_build(copy).build(copy / "_C.so", cuda="none", narrow_avx512=True, sanitizer="address,undefined")
    return copy / "_C.so"


@pytest.mark.sanitize
@pytest.mark.timeout(1800)
@sanitized
@pytest.mark.xdist_group("unchecked")  # a library of their own
@pytest.mark.parametrize("family", PLANTED)
def test_the_fuzz_finds_a_check_that_is_left_out(family, unchecked):
    done = run([FUZZ, "--calls", "3000", "--compiled", "0", "--only", family], unchecked, **_preload())
    assert "ERROR: AddressSanitizer" in done.stderr
    assert "served" not in done.stdout


@pytest.mark.skipif(native.missing() is not None, reason="needs the extension")
def test_threads_change_no_bit(request):
    """Chunks and splits depend on sizes alone."""
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    runs = []
    training = GistLayout.from_segments([300] * 5, 8, tail=60)
    decoding = GistLayout.decode(5000, 20, rows=2)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = []
        for layout in (training, decoding):
            inputs = make_inputs(layout, heads=6, kv_heads=2)
            past = {"past_key": inputs.past_key, "past_value": inputs.past_value}
            out, lse = gist_attention(inputs.q, inputs.k, inputs.v, layout, **past, backend="cpu", return_lse=True)
            results += [out, lse, *torch.autograd.grad(out, list(inputs.leaves().values()), inputs.grad_out)]
        runs.append(results)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
